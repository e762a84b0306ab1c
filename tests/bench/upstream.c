/* A model server that costs next to nothing, so that a proxy is what is measured.
 *
 *     upstream PORT
 *
 * One thread; HTTP/1.1 with keep-alive; OpenAI's chat completions and completions, in
 * one piece or streamed as vLLM does, each event in a chunk of its own. The model's
 * name says how a stream goes: in sim-n64-d5000 it has 64 events with text, one each
 * 5000 µs; with -d0 all are written at once.
 *
 * Every text begins with the mark @, so that they can be counted in whatever a proxy
 * makes of them. In a paced stream the monotonic time of sending follows, in µs and 15
 * digits; and the first text says before that, after a #, when the request was read.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MAX_REQUEST (64u << 20)
#define MAX_EVENTS 1000000

struct bytes {
    char *data;
    size_t length, size;
};

struct connection {
    int fd;
    size_t place; /* in the queue, from 1; 0: not there */
    struct bytes in, out;
    bool waits_to_write;
    bool chat, usage;
    int events, sent;
    uint64_t read_us, gap_us, due_us;
};

struct burst {
    struct burst *next;
    bool chat, usage;
    int events;
    struct bytes bytes;
};

static int poller, timer;
static struct connection **queue; /* a binary heap: the first is due first */
static size_t queued, queue_size;
static uint64_t armed_us;
static struct burst *bursts;

static uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void *grown(void *memory, size_t size) {
    memory = realloc(memory, size);
    if (!memory) {
        perror("realloc");
        exit(1);
    }
    return memory;
}

static void append(struct bytes *to, const char *data, size_t length) {
    if (to->length + length > to->size) {
        to->size = (to->length + length) * 2;
        to->data = grown(to->data, to->size);
    }
    memcpy(to->data + to->length, data, length);
    to->length += length;
}

static void drop(struct bytes *from, size_t length) {
    from->length -= length;
    if (from->length) memmove(from->data, from->data + length, from->length);
}

/* ------------------------------------------------------------------ who is due when */

static void put(size_t place, struct connection *c) {
    queue[place] = c;
    c->place = place;
}

static void settle(size_t place, struct connection *c) {
    while (place > 1 && queue[place / 2]->due_us > c->due_us) {
        put(place, queue[place / 2]);
        place /= 2;
    }
    for (size_t child; (child = place * 2) <= queued; place = child) {
        if (child < queued && queue[child + 1]->due_us < queue[child]->due_us) child++;
        if (queue[child]->due_us >= c->due_us) break;
        put(place, queue[child]);
    }
    put(place, c);
}

static void enqueue(struct connection *c) {
    if (++queued >= queue_size) {
        queue_size = queued * 2;
        queue = grown(queue, queue_size * sizeof *queue);
    }
    settle(queued, c);
}

static void dequeue(struct connection *c) {
    size_t place = c->place;
    if (!place) return;
    struct connection *last = queue[queued--];
    if (last != c) settle(place, last);
    c->place = 0;
}

static void arm(void) {
    uint64_t due_us = queued ? queue[1]->due_us : 0;
    if (due_us == armed_us) return;
    struct itimerspec at = {.it_value = {(time_t)(due_us / 1000000),
                                         (long)(due_us % 1000000) * 1000}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
    armed_us = due_us;
}

/* ------------------------------------------------------------------ what is sent */

#define CHUNK "\"created\":1700000000,\"model\":\"sim\",\"choices\":[{\"index\":0,"
#define CHAT "data: {\"id\":\"chatcmpl-5e1f\",\"object\":\"chat.completion.chunk\"," CHUNK
#define TEXT "data: {\"id\":\"cmpl-5e1f\",\"object\":\"text_completion\"," CHUNK
#define USAGE "{\"prompt_tokens\":7,\"total_tokens\":%d,\"completion_tokens\":%d}"
#define END "0\r\n\r\n"

static const char head[] =
    "HTTP/1.1 200 OK\r\nserver: sim\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    "transfer-encoding: chunked\r\n\r\n";

static void chunk(struct bytes *to, const char *data, int length) {
    char size[16];
    append(to, size, (size_t)snprintf(size, sizeof size, "%x\r\n", length));
    append(to, data, (size_t)length);
    append(to, "\r\n", 2);
}

static void role(struct bytes *to) {
    static const char event[] =
        CHAT "\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
             "\"logprobs\":null,\"finish_reason\":null}]}\n\n";
    chunk(to, event, sizeof event - 1);
}

static void text(struct bytes *to, bool chat, const char *said) {
    char event[512];
    int length = snprintf(
        event, sizeof event, "%s\"%s\":%s\"%s\"%s,\"logprobs\":null,\"finish_reason\":null}]}\n\n",
        chat ? CHAT : TEXT, chat ? "delta" : "text", chat ? "{\"content\":" : "", said,
        chat ? "}" : "");
    chunk(to, event, length);
}

static void ending(struct bytes *to, bool chat, bool usage, int events) {
    char event[512];
    int length = snprintf(
        event, sizeof event, "%s%s,\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n",
        chat ? CHAT : TEXT, chat ? "\"delta\":{}" : "\"text\":\"\"");
    chunk(to, event, length);
    if (usage) {
        length = snprintf(
            event, sizeof event,
            "data: {\"id\":\"chatcmpl-5e1f\",\"object\":\"%s\",\"created\":1700000000,"
            "\"model\":\"sim\",\"choices\":[],\"usage\":" USAGE "}\n\n",
            chat ? "chat.completion.chunk" : "text_completion", events + 7, events);
        chunk(to, event, length);
    }
    chunk(to, "data: [DONE]\n\n", 14);
    append(to, END, sizeof END - 1);
}

static const struct bytes *burst_of(bool chat, bool usage, int events) {
    static const char *words[] = {"@The", "@ of", "@ answer", "@, and"};
    for (struct burst *b = bursts; b; b = b->next)
        if (b->chat == chat && b->usage == usage && b->events == events) return &b->bytes;
    struct burst *made = grown(NULL, sizeof *made);
    *made = (struct burst){bursts, chat, usage, events, {0}};
    append(&made->bytes, head, sizeof head - 1);
    if (chat) role(&made->bytes);
    for (int n = 0; n < events; n++) text(&made->bytes, chat, words[n % 4]);
    ending(&made->bytes, chat, usage, events);
    bursts = made;
    return &made->bytes;
}

/* ------------------------------------------------------------------ connections */

static void watch(struct connection *c, bool write) {
    if (c->waits_to_write == write) return;
    struct epoll_event event = {EPOLLIN | (write ? EPOLLOUT : 0), {.ptr = c}};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
    c->waits_to_write = write;
}

static void hang_up(struct connection *c) {
    dequeue(c);
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
}

/* Returns whether the connection still is. */
static bool flush(struct connection *c) {
    if (c->out.length) {
        ssize_t sent = send(c->fd, c->out.data, c->out.length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            hang_up(c);
            return false;
        }
        if (sent > 0) drop(&c->out, (size_t)sent);
    }
    watch(c, c->out.length > 0);
    return true;
}

static bool push(struct connection *c, const char *data, size_t length) {
    if (!c->out.length) { /* mostly all of it goes at once, and nothing is copied */
        ssize_t sent = send(c->fd, data, length, MSG_NOSIGNAL);
        if (sent < 0 && errno != EAGAIN) {
            hang_up(c);
            return false;
        }
        if (sent > 0) data += sent, length -= (size_t)sent;
    }
    if (length) append(&c->out, data, length);
    watch(c, c->out.length > 0);
    return true;
}

static void serve(struct connection *c);

static void tick(struct connection *c, uint64_t now) {
    static struct bytes made;
    char said[64];
    if (c->sent++)
        snprintf(said, sizeof said, "@%015" PRIu64, now);
    else
        snprintf(said, sizeof said, "#%015" PRIu64 "@%015" PRIu64, c->read_us, now);
    made.length = 0;
    text(&made, c->chat, said);
    if (c->sent == c->events) {
        ending(&made, c->chat, c->usage, c->events);
        dequeue(c);
    } else {
        c->due_us += c->gap_us;
        settle(c->place, c);
    }
    if (push(c, made.data, made.length) && !c->place) serve(c);
}

static bool reply(struct connection *c, const char *status, const char *json) {
    char whole[1024];
    int length = snprintf(
        whole, sizeof whole,
        "HTTP/1.1 %s\r\nserver: sim\r\ncontent-type: application/json\r\n"
        "content-length: %zu\r\n\r\n%s",
        status, strlen(json), json);
    return push(c, whole, (size_t)length);
}

static bool has(const char *body, size_t length, const char *key) {
    const char *at = memmem(body, length, key, strlen(key));
    if (!at) return false;
    for (at += strlen(key); at < body + length && (*at == ' ' || *at == ':'); at++);
    return at < body + length && *at == 't';
}

static long number(const char *name, const char *end, char letter, long otherwise) {
    for (; name + 2 < end && *name != '"'; name++)
        if (name[0] == '-' && name[1] == letter && name[2] >= '0' && name[2] <= '9')
            return strtol(name + 2, NULL, 10);
    return otherwise;
}

static bool answer(struct connection *c, const char *body, size_t length) {
    const char *end = body + length, *name = memmem(body, length, "\"model\"", 7);
    if (name) name = memchr(name + 7, '"', (size_t)(end - name - 7));
    name = name ? name + 1 : end;
    long events = number(name, end, 'n', 64), gap_us = number(name, end, 'd', 0);
    if (events < 1 || events > MAX_EVENTS || gap_us < 0)
        return reply(c, "400 Bad Request", "{\"error\":{\"message\":\"odd model name\"}}");
    if (!has(body, length, "\"stream\""))
        return reply(
            c, "200 OK",
            c->chat ? "{\"id\":\"chatcmpl-5e1f\",\"object\":\"chat.completion\",\"created\":1700000000,"
                      "\"model\":\"sim\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
                      "\"content\":\"@My name is Simulator.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                      "\"usage\":{\"prompt_tokens\":7,\"total_tokens\":12,\"completion_tokens\":5}}"
                    : "{\"id\":\"cmpl-5e1f\",\"object\":\"text_completion\",\"created\":1700000000,"
                      "\"model\":\"sim\",\"choices\":[{\"index\":0,\"text\":\"@My name is Simulator.\","
                      "\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                      "\"usage\":{\"prompt_tokens\":7,\"total_tokens\":12,\"completion_tokens\":5}}");
    c->usage = has(body, length, "\"include_usage\"");
    c->events = (int)events;
    if (!gap_us) {
        const struct bytes *burst = burst_of(c->chat, c->usage, c->events);
        return push(c, burst->data, burst->length);
    }
    struct bytes begin = {0};
    append(&begin, head, sizeof head - 1);
    if (c->chat) role(&begin);
    c->sent = 0;
    c->read_us = now_us();
    c->gap_us = (uint64_t)gap_us;
    c->due_us = c->read_us + c->gap_us;
    enqueue(c);
    bool alive = push(c, begin.data, begin.length);
    free(begin.data);
    return alive;
}

/* Answers what has arrived whole; one request at a time. */
static void serve(struct connection *c) {
    while (c->in.length && !c->place) {
        char *end = memmem(c->in.data, c->in.length, "\r\n\r\n", 4);
        if (!end) return;
        *end = 0; /* the head is a string now */
        char *line = strcasestr(c->in.data, "\ncontent-length:");
        size_t length = line ? strtoul(line + 16, NULL, 10) : 0;
        size_t whole = (size_t)(end + 4 - c->in.data) + length;
        bool post = !strncmp(c->in.data, "POST ", 5);
        char *path = strchr(c->in.data, ' '), *after = path ? strchr(path + 1, ' ') : NULL;
        if (!after || length > MAX_REQUEST || strcasestr(c->in.data, "\ntransfer-encoding:")) {
            c->in.length = 0;
            if (reply(c, "411 Length Required", "{\"error\":{\"message\":\"no content-length\"}}"))
                shutdown(c->fd, SHUT_WR);
            return;
        }
        if (c->in.length < whole) {
            *end = '\r';
            return;
        }
        *after = 0;
        bool alive;
        c->chat = strstr(path, "/chat/completions") != NULL;
        if (post && strstr(path, "/completions"))
            alive = answer(c, end + 4, length);
        else if (!post && strstr(path, "/models"))
            alive = reply(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"sim\",\"object\":\"model\"}]}");
        else
            alive = reply(c, "404 Not Found", "{\"error\":{\"message\":\"no such path\"}}");
        if (!alive) return;
        drop(&c->in, whole);
    }
}

static void take(struct connection *c) {
    static char buffer[65536];
    ssize_t length = recv(c->fd, buffer, sizeof buffer, 0);
    if (length < 0 && errno == EAGAIN) return;
    if (length <= 0) {
        hang_up(c);
        return;
    }
    append(&c->in, buffer, (size_t)length);
    append(&c->in, "", 1); /* so that no search runs past the end */
    c->in.length--;
    serve(c);
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct connection *c = grown(NULL, sizeof *c);
        *c = (struct connection){.fd = fd};
        struct epoll_event event = {EPOLLIN, {.ptr = c}};
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    struct sockaddr_in at = {.sin_family = AF_INET,
                             .sin_port = htons((uint16_t)port),
                             .sin_addr = {htonl(INADDR_LOOPBACK)}};
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) {
        perror("upstream");
        exit(1);
    }
    return fd;
}

int main(int count, char **arguments) {
    if (count != 2) {
        fprintf(stderr, "usage: upstream PORT\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* do not outlive who started it */
    int listener = listen_on(atoi(arguments[1]));
    poller = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event happened[256];
    happened[0] = (struct epoll_event){EPOLLIN, {.ptr = &listener}};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &happened[0]);
    happened[0].data.ptr = &timer;
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &happened[0]);
    for (;;) {
        int ready = epoll_wait(poller, happened, 256, -1);
        bool time_is_up = false;
        for (int n = 0; n < ready; n++) {
            void *what = happened[n].data.ptr;
            if (what == &listener)
                welcome(listener);
            else if (what == &timer)
                time_is_up = true; /* later: a connection may be named once more below */
            else if (!(happened[n].events & EPOLLOUT) || flush(what))
                if (happened[n].events & ~(uint32_t)EPOLLOUT) take(what);
        }
        if (time_is_up) {
            uint64_t times;
            if (read(timer, &times, sizeof times) < 0) times = 0;
            armed_us = 0;
            for (uint64_t now; queued && queue[1]->due_us <= (now = now_us());)
                tick(queue[1], now);
        }
        arm();
    }
}
