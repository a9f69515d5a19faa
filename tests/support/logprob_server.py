"""vLLM's `prompt_logprobs` over HTTP, from a model that transformers runs."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class LogprobServer(ThreadingHTTPServer):
    """Starts on a free port; `url` is its address.

    `most` is its `--max-logprobs`; of the next `failures` requests each gets a 503.
    """

    daemon_threads = True

    def __init__(self, model, tokenizer, most=32):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self.asked, self.failures, self.lock = 0, 0, threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @torch.no_grad()
    def said(self, prompt, count):
        logits = self.model(input_ids=torch.tensor([prompt])).logits[0, :-1]
        places = [None]
        for own, nats in zip(prompt[1:], logits.log_softmax(-1), strict=True):
            ids = {*nats.topk(count).indices.tolist(), own}
            text = self.tokenizer.decode
            places.append({i: {"logprob": nats[i].item(), "decoded_token": text([i])} for i in ids})
        return places


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, count = self.server, question["prompt_logprobs"]
        with server.lock:
            server.asked += 1
            server.failures -= 1
            failing = server.failures >= 0
        if failing:
            return self.send_error(503)
        if count > server.most:
            return self.answer(400, {"error": {"message": f"at most {server.most} logprobs"}})
        said = server.said(question["prompt"], count)
        return self.answer(200, {"choices": [{"text": "", "prompt_logprobs": said}]})

    def answer(self, status, data):
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass
