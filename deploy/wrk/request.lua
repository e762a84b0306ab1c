-- One kind of request, over and over:
--   wrk -t1 -c32 -d5s -s request.lua http://127.0.0.1:8080 -- KIND
-- Counts what is no success: a status other than 200, and a stream without its end.

local question = '{"messages":[{"speaker":"human","text":"What is your name?"}],"maxTokensToSample":64'
local chat = '{"model":"tgi","max_tokens":64,"messages":[{"role":"user","content":"What is your name?"}]'

local kinds = {
  ["openai-plain"] = { "/v1/chat/completions", chat .. "}", nil },
  ["openai-stream"] = { "/v1/chat/completions", chat .. ',"stream":true}', "data: %[DONE%]" },
  ["cody-legacy"] = { "/.api/completions/stream", question .. "}", "event: done" },
  ["cody-v1"] = { "/.api/completions/stream?api-version=1", question .. "}", "event: done" },
  ["cody-stream"] = { "/.api/completions/stream?api-version=8", question .. "}", "event: done" },
  ["cody-plain"] = { "/.api/completions/stream?api-version=8", question .. ',"stream":false}', nil },
  ["cody-code"] = { "/.api/completions/code?api-version=8", question .. ',"stream":true}', "event: done" },
}
local order = { "openai-plain", "openai-stream", "cody-legacy", "cody-v1", "cody-stream", "cody-plain", "cody-code" }

local chosen, turn, asked = {}, 0, {}
local threads = {}
failed = 0

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  local kind = args[1] or "mixed"
  for _, name in ipairs(kind == "mixed" and order or { kind }) do
    table.insert(chosen, kinds[name] or error("no kind " .. name))
  end
  wrk.headers["Content-Type"] = "application/json"
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
  if status ~= 200 or (ending and not body:find(ending)) then failed = failed + 1 end
end

function done(summary, latency, requests)
  local bad = 0
  for _, thread in ipairs(threads) do bad = bad + thread:get("failed") end
  local errors = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  print(string.format("RESULT %d %d %d %d %d %d", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), bad, errors))
end
