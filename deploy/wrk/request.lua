-- One kind of request, over and over:
--   wrk -t1 -c32 -d5s -s request.lua http://127.0.0.1:8080 -- KIND [MODEL [TOKEN]]
-- Counts what is no success: a status other than 200, and a stream without its end.
-- Prints RESULT, the requests, µs, failures, and the latency's percentiles in µs:
-- 0, 1, … 99, 99.9, 100.

local question = '"messages":[{"speaker":"human","text":"What is your name?"}],"maxTokensToSample":64}'
local chat = '"max_tokens":64,"messages":[{"role":"user","content":"What is your name?"}]}'
local streamed = '"stream":true,'

local kinds = {
  ["openai-plain"] = { "/v1/chat/completions", chat, nil },
  ["openai-stream"] = { "/v1/chat/completions", streamed .. chat, "data: %[DONE%]" },
  ["cody-legacy"] = { "/.api/completions/stream", question, "event: done" },
  ["cody-v1"] = { "/.api/completions/stream?api-version=1", question, "event: done" },
  ["cody-stream"] = { "/.api/completions/stream?api-version=8", question, "event: done" },
  ["cody-plain"] = { "/.api/completions/stream?api-version=8", '"stream":false,' .. question, nil },
  ["cody-code"] = { "/.api/completions/code?api-version=8", streamed .. question, "event: done" },
}
local order = { "openai-plain", "openai-stream", "cody-legacy", "cody-v1", "cody-stream", "cody-plain", "cody-code" }

local chosen, turn = {}, 0
local threads = {}
failed = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local kind, model, token = args[1] or "mixed", args[2] or "tgi", args[3]
  for _, name in ipairs(kind == "mixed" and order or { kind }) do
    local path, rest, ending = unpack(kinds[name] or error("no kind " .. name))
    table.insert(chosen, { path, string.format('{"model":"%s",%s', model, rest), ending })
  end
  wrk.headers["Content-Type"] = "application/json"
  if token then wrk.headers["Authorization"] = "Bearer " .. token end
  wrk.method = "POST"
end

function request()
  turn = turn % #chosen + 1
  return wrk.format(nil, chosen[turn][1], nil, chosen[turn][2])
end

function response(status, headers, body)
  -- Replies of a mixed run cannot be told apart here, so only a single kind's end is
  -- looked for.
  local ending = #chosen == 1 and chosen[1][3]
  if status ~= 200 or (ending and not body:sub(-64):find(ending)) then failed = failed + 1 end
end

function done(summary, latency, requests)
  local bad = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  for _, thread in ipairs(threads) do bad = bad + thread:get("failed") end
  local curve = {}
  for n = 0, 99 do curve[n + 1] = math.floor(latency:percentile(math.max(n, 0.01))) end
  curve[101], curve[102] = math.floor(latency:percentile(99.9)), latency.max
  print(string.format("RESULT %d %d %d ", summary.requests, summary.duration, bad) .. table.concat(curve, " "))
end
