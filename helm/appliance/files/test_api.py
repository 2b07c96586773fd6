"""What `helm test` runs, in the appliance's own image: waits until the server is ready, then calls the API.

Arguments: base URL, seconds to wait. APPLIANCE_API_KEYS as the server has it, if it has. Standard library only.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

base, wait_seconds = sys.argv[1], float(sys.argv[2])
key = os.environ.get("APPLIANCE_API_KEYS", "").split(",")[0].strip()
tls = ssl._create_unverified_context()  # the API is tested, not the certificate: its names are those of clients


def call(path: str, body: dict | None = None) -> tuple[int, str]:
    """Status and text of an answer; 0 and the reason where there is none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120, context=tls) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def expect(ok: bool, what: str, found: object) -> None:
    if not ok:
        sys.exit(f"FAILED {what}: {found}")
    print(f"ok {what}", flush=True)


until = time.monotonic() + wait_seconds
while (ready := call("/v1/health/ready"))[0] != 200 and time.monotonic() < until:
    time.sleep(1)
expect(ready[0] == 200, "ready", ready)
live = call("/v1/health/live")
expect(live[0] == 200, "live", live)

models = call("/v1/models")
expect(models[0] == 200, "models", models)
name = json.loads(models[1])["data"][0]["id"]

question = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
chat = call("/v1/chat/completions", question)
expect(chat[0] == 200, "chat", chat)
answer = json.loads(chat[1])
expect(answer["usage"]["completion_tokens"] > 0, "tokens", answer)

stream = call("/v1/chat/completions", question | {"stream": True})
expect(stream[0] == 200 and stream[1].rstrip().endswith("data: [DONE]"), "stream", stream)

metrics = call("/metrics")
expect(metrics[0] == 200 and "num_requests_waiting" in metrics[1], "metrics", metrics)
