/* A client that reads streams as they come, and says when each event came.
 *
 *     streams -p PORT -a PATH -b BODYFILE [-H HEADER]... [-c CONNECTIONS] [-n REPLIES]
 *             [-m EVENTS] [-e ENDING] [-1] [-r RAMP_MS] [-t TIMEOUT_S]
 *
 * CONNECTIONS ask one request after the other until REPLIES have been asked for; they
 * begin over RAMP_MS. A reply is whole if its status is 200, its body has EVENTS marks
 * (see upstream.c) and, with -e, ENDING near its end. -1: each line has the whole text
 * so far, so what was in the one before does not count again. Which dialect frames the
 * text is nowhere looked at.
 *
 * Prints one line of JSON. Times are in µs, as percentiles 0, 1, … 99, 99.9, 100:
 * total, ttfb: from the request to the whole reply and to its first byte;
 * ttft: to the first text, without what the upstream itself waited before it sent it;
 * delay: from the upstream's sending of an event to its arrival here;
 * gap: how much longer the pause before an event was here than at the upstream.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define MAX_HEAD 16384
#define TAIL 64

struct samples {
    uint32_t *us;
    size_t count, size;
};

enum framing { LENGTH, CHUNKED, UNTIL_CLOSE };
enum part { HEAD, CHUNK_SIZE, EXTENSION, BODY, CHUNK_END, TRAILER };

struct connection {
    int fd;
    bool busy, fresh;
    size_t sent; /* of the request */
    uint64_t begin_at_us, asked_us;
    /* the reply's framing */
    enum part part;
    enum framing framing;
    char head[MAX_HEAD];
    size_t head_length;
    uint64_t left;
    int status;
    /* its text */
    char tail[TAIL];
    size_t tail_length;
    int events, in_line, digits;
    char stamp; /* @ or #: digits may follow */
    bool counted; /* the event that the stamp belongs to is new */
    uint64_t number, read_us, last_sent_us, last_delay_us;
};

static const char *path = "/", *ending = "";
static char *headers = "", *body;
static size_t body_length;
static int port, expected = 1;
static bool cumulative;

static char *request;
static size_t request_length;
static int poller;
static long asked, to_ask, whole, failed, events;
static uint64_t body_bytes, last_us;
static char first_failure[512];
static struct samples total, ttfb, ttft, delay, gap;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void add(struct samples *to, int64_t us) {
    if (to->count == to->size) {
        to->size = to->size ? to->size * 2 : 4096;
        to->us = realloc(to->us, to->size * sizeof *to->us);
        if (!to->us) die("realloc");
    }
    to->us[to->count++] = us < 0 ? 0 : us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

/* ------------------------------------------------------------------ one request */

static void dial(struct connection *c) {
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int one = 1;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&to, sizeof to)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {EPOLLIN, {.ptr = c}};
    epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
    c->fresh = true;
}

static void redial(struct connection *c) {
    close(c->fd);
    dial(c);
}

static void push(struct connection *c) {
    ssize_t sent = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL);
    if (sent > 0) c->sent += (size_t)sent;
    if (c->sent < request_length) {
        struct epoll_event event = {EPOLLIN | EPOLLOUT, {.ptr = c}};
        epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
    }
}

static void pushed(struct connection *c) {
    struct epoll_event event = {EPOLLIN, {.ptr = c}};
    push(c);
    if (c->sent == request_length) epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void ask(struct connection *c) {
    c->busy = true;
    c->part = HEAD;
    c->sent = c->head_length = c->tail_length = 0;
    c->status = c->events = c->in_line = c->digits = 0;
    c->stamp = 0;
    c->read_us = c->last_sent_us = 0;
    c->asked_us = now_us();
    push(c);
}

static void next(struct connection *c) {
    c->busy = false;
    if (asked < to_ask) {
        asked++;
        ask(c);
    }
}

static bool ended_well(const struct connection *c) {
    return !*ending || memmem(c->tail, c->tail_length, ending, strlen(ending));
}

static void done(struct connection *c, bool in_order) {
    last_us = now_us();
    events += c->events;
    if (in_order && c->status == 200 && c->events == expected && ended_well(c)) {
        whole++;
        add(&total, (int64_t)(last_us - c->asked_us));
    } else {
        if (!failed)
            snprintf(first_failure, sizeof first_failure, "%s; status %d, %d of %d events, tail %.*s",
                     in_order ? "reply not whole" : "connection lost", c->status, c->events,
                     expected, (int)c->tail_length, c->tail);
        failed++;
    }
    c->fresh = false;
}

/* ------------------------------------------------------------------ a reply's text */

static void stamped(struct connection *c, uint64_t now) {
    if (c->stamp == '#') {
        c->read_us = c->number;
    } else if (c->counted) {
        uint64_t late = now - c->number;
        add(&delay, (int64_t)late);
        if (c->last_sent_us)
            add(&gap, (int64_t)late - (int64_t)c->last_delay_us);
        else if (c->read_us)
            add(&ttft, (int64_t)(now - c->asked_us - (c->number - c->read_us)));
        c->last_sent_us = c->number;
        c->last_delay_us = late;
    }
}

static void read_text(struct connection *c, const char *data, size_t length, uint64_t now) {
    body_bytes += length;
    for (const char *p = data, *end = data + length; p < end; p++) {
        if (c->stamp) {
            if (*p >= '0' && *p <= '9') {
                c->number = c->number * 10 + (uint64_t)(*p - '0');
                c->digits++;
                continue;
            }
            if (c->digits == 15) stamped(c, now);
            c->stamp = 0;
        }
        if (*p == '@' || *p == '#') {
            c->stamp = *p;
            c->number = 0;
            c->digits = 0;
            if (*p == '@') {
                c->counted = ++c->in_line > c->events || !cumulative;
                c->events += c->counted;
            }
        } else if (*p == '\n') {
            c->in_line = 0;
        }
    }
    if (length >= TAIL) {
        memcpy(c->tail, data + length - TAIL, TAIL);
        c->tail_length = TAIL;
        return;
    }
    size_t keep = c->tail_length + length > TAIL ? TAIL - length : c->tail_length;
    memmove(c->tail, c->tail + c->tail_length - keep, keep);
    memcpy(c->tail + keep, data, length);
    c->tail_length = keep + length;
}

/* ------------------------------------------------------------------ a reply's framing */

static void read_head(struct connection *c) {
    char *length = strcasestr(c->head, "\ncontent-length:");
    c->status = strncmp(c->head, "HTTP/1.1 ", 9) ? -1 : atoi(c->head + 9);
    if (strcasestr(c->head, "\ntransfer-encoding: chunked")) {
        c->framing = CHUNKED;
        c->part = CHUNK_SIZE;
        c->left = 0;
    } else {
        c->framing = length ? LENGTH : UNTIL_CLOSE;
        c->part = BODY;
        c->left = length ? strtoull(length + 16, NULL, 10) : UINT64_MAX;
    }
}

static int digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    c |= 0x20;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Returns whether the reply is over. */
static bool feed(struct connection *c, const char *p, size_t length, uint64_t now) {
    const char *end = p + length;
    if (c->part == HEAD && !c->head_length) add(&ttfb, (int64_t)(now - c->asked_us));
    while (p < end) {
        switch (c->part) {
        case HEAD:
            if (c->head_length == MAX_HEAD - 1) return true;
            c->head[c->head_length++] = *p++;
            c->head[c->head_length] = 0;
            if (c->head_length >= 4 && !memcmp(c->head + c->head_length - 4, "\r\n\r\n", 4)) {
                read_head(c);
                if (c->framing == LENGTH && !c->left) return true;
            }
            break;
        case CHUNK_SIZE:
        case EXTENSION:
            if (*p == '\n') {
                c->part = c->left ? BODY : TRAILER;
                c->head_length = 0;
            } else if (digit(*p) < 0) {
                c->part = EXTENSION; /* or a carriage return */
            } else if (c->part == CHUNK_SIZE) {
                c->left = c->left * 16 + (uint64_t)digit(*p);
            }
            p++;
            break;
        case BODY: {
            size_t part = (size_t)(end - p) < c->left ? (size_t)(end - p) : (size_t)c->left;
            read_text(c, p, part, now);
            p += part;
            if (c->framing != UNTIL_CLOSE) c->left -= part;
            if (!c->left) {
                if (c->framing == LENGTH) return true;
                c->part = CHUNK_END;
            }
            break;
        }
        case CHUNK_END:
            if (*p++ == '\n') c->part = CHUNK_SIZE;
            break;
        case TRAILER: /* lines up to an empty one; head_length counts what the line has */
            if (*p == '\n' && !c->head_length) return true;
            if (*p == '\n')
                c->head_length = 0;
            else if (*p != '\r')
                c->head_length++;
            p++;
            break;
        }
    }
    return false;
}

static void take(struct connection *c) {
    static char buffer[262144];
    ssize_t length = recv(c->fd, buffer, sizeof buffer, 0);
    if (length < 0 && errno == EAGAIN) return;
    if (length > 0 && c->busy) {
        if (feed(c, buffer, (size_t)length, now_us())) {
            done(c, true);
            next(c);
        }
        return;
    }
    bool was_idle = !c->busy;
    bool stale = c->busy && !c->fresh && c->part == HEAD && !c->head_length;
    redial(c);
    if (stale) { /* closed just before the request arrived: nobody's fault */
        ask(c);
    } else if (!was_idle) {
        done(c, c->part == BODY && c->framing == UNTIL_CLOSE && length == 0);
        c->fresh = true;
        next(c);
    }
}

/* ------------------------------------------------------------------ all of it */

static int by_size(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void print(const char *name, struct samples *s) {
    if (s->count) qsort(s->us, s->count, sizeof *s->us, by_size);
    printf(", \"%s\": [", name);
    for (int n = 0; n <= 101 && s->count; n++) {
        double share = n < 100 ? n / 100.0 : n == 100 ? 0.999 : 1;
        printf("%s%u", n ? ", " : "", s->us[(size_t)(share * (double)(s->count - 1))]);
    }
    printf("]");
}

static void read_body(const char *name) {
    FILE *file = fopen(name, "rb");
    if (!file) die(name);
    body = malloc(1 << 20);
    body_length = fread(body, 1, 1 << 20, file);
    fclose(file);
}

static void make_request(void) {
    int length = asprintf(&request,
                          "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
                          "%sContent-Length: %zu\r\n\r\n",
                          path, port, headers, body_length);
    request = realloc(request, (size_t)length + body_length);
    memcpy(request + length, body, body_length);
    request_length = (size_t)length + body_length;
}

int main(int count, char **arguments) {
    int option, connections = 1, ramp_ms = 0, timeout_s = 60;
    while ((option = getopt(count, arguments, "p:a:b:H:c:n:m:e:r:t:1")) != -1) {
        char *joined;
        switch (option) {
        case 'p': port = atoi(optarg); break;
        case 'a': path = optarg; break;
        case 'b': read_body(optarg); break;
        case 'H':
            if (asprintf(&joined, "%s%s\r\n", headers, optarg) > 0) headers = joined;
            break;
        case 'c': connections = atoi(optarg); break;
        case 'n': to_ask = atol(optarg); break;
        case 'm': expected = atoi(optarg); break;
        case 'e': ending = optarg; break;
        case 'r': ramp_ms = atoi(optarg); break;
        case 't': timeout_s = atoi(optarg); break;
        case '1': cumulative = true; break;
        default: return 2;
        }
    }
    if (!port || !body || connections < 1) {
        fprintf(stderr, "usage: streams -p PORT -a PATH -b BODYFILE …\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* do not outlive who started it */
    make_request();
    poller = epoll_create1(EPOLL_CLOEXEC);
    struct connection *all = calloc((size_t)connections, sizeof *all);
    for (int n = 0; n < connections; n++) dial(&all[n]);
    uint64_t begun_us = now_us(), end_us = begun_us + (uint64_t)timeout_s * 1000000;
    for (int n = 0; n < connections; n++)
        all[n].begin_at_us = begun_us + (uint64_t)ramp_ms * 1000 * (uint64_t)n / (uint64_t)connections;
    int begun = 0;
    struct epoll_event happened[256];
    while (whole + failed < to_ask) {
        uint64_t now = now_us();
        while (begun < connections && all[begun].begin_at_us <= now) next(&all[begun++]);
        if (now > end_us) break;
        uint64_t until_us = begun < connections ? all[begun].begin_at_us : end_us;
        int wait_ms = until_us > now ? (int)((until_us - now) / 1000) + 1 : 0;
        int ready = epoll_wait(poller, happened, 256, wait_ms);
        for (int n = 0; n < ready; n++) {
            struct connection *c = happened[n].data.ptr;
            if (happened[n].events & EPOLLOUT) pushed(c);
            if (happened[n].events & ~(uint32_t)EPOLLOUT) take(c);
        }
    }
    long unfinished = asked - whole - failed;
    for (int n = 0; n < connections; n++) events += all[n].busy ? all[n].events : 0;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"asked\": %ld, \"requests\": %ld, \"failed\": %ld, \"unfinished\": %ld, \"events\": %ld, \"lost\": %ld, "
           "\"bytes\": %llu, \"seconds\": %.6f, \"cpu_s\": %.6f",
           asked, whole, failed, unfinished, events, asked * expected - events,
           (unsigned long long)body_bytes, (double)((last_us ? last_us : now_us()) - begun_us) / 1e6,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
               (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6);
    print("total", &total);
    print("ttfb", &ttfb);
    print("ttft", &ttft);
    print("delay", &delay);
    print("gap", &gap);
    printf(", \"first_failure\": \"");
    for (char *p = first_failure; *p; p++)
        if (*p >= ' ' && *p != '"' && *p != '\\' && (unsigned char)*p < 127) putchar(*p);
    printf("\"}\n");
    return 0;
}
