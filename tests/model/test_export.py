"""A saved model leaves for other programs with the same answers, and for the hub with nothing left behind."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import toolkit
from toolkit.__main__ import main
from toolkit.errors import InputError


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    experiment = toolkit.Experiment(method="lora", device="cpu")
    toolkit.seed_everything(0)
    model = toolkit.adapt(toolkit.build_model(experiment, 10), "lora", **experiment.method_options)
    saved = toolkit.save_model(tmp_path_factory.mktemp("saved"), model, digits, experiment)
    config = json.loads((saved / "config.json").read_text())
    config["toolkit"]["score_pct"] = 90.0  # as from the record of a run
    (saved / "config.json").write_text(json.dumps(config))
    return saved


def test_onnx_holds_the_network_its_preprocessing_and_its_classes(folder):
    onnxruntime = pytest.importorskip("onnxruntime")
    exported = toolkit.export_model(folder, "onnx")
    assert exported.difference < 1e-4 and exported.bytes == (folder / "model.onnx").stat().st_size
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"])[7] == "7"
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["input_size"] == [3, 32, 32] and preprocessing["crop_mode"] == "squash"
    images = torch.randn(5, 3, 32, 32)  # a batch of another size than the one that was traced
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = toolkit.load_model(folder).model(images).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_torch_export_file_runs_without_this_package(folder):
    exported = toolkit.export_model(folder, "torch-export")
    cost = (exported.seconds * exported.bytes / 2**20) ** (1 / 8)
    assert exported.score == pytest.approx(20 * np.log10(90**2 / cost))
    found = {"preprocessing": "", "classes": ""}
    program = torch.export.load(exported.path, extra_files=found)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), toolkit.load_model(folder).model(images))
    assert json.loads(found["classes"]) == [str(digit) for digit in range(10)]


def test_an_unknown_format_is_refused(folder, capsys):
    assert main(["export", str(folder), "--format", "onx"]) == 2
    assert "Did you mean 'onnx'?" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's interface that an upload of small files uses."""

    files: dict
    asked: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            answer = {"url": f"http://{self.headers['Host']}/someone/{name}", "name": f"someone/{name}"}
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            answer = {"files": [file | {"shouldIgnore": False} for file in files]}
        elif "/commit/" not in self.path:  # the card's front matter is checked
            answer = {"warnings": [], "errors": []}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitOid": "0" * 40,
                "commitUrl": "https://huggingface.co/someone/digits/commit/0",
                "success": True,
            }
        self._send(answer)

    def do_GET(self):
        self._send({"id": "someone/digits", "sha": "0" * 40, "siblings": []})

    def _send(self, answer):
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("OneHub", (Hub,), {"files": {}, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield handler
    server.shutdown()
    server.server_close()


def test_push_copies_every_file_with_the_token(folder, hub, capsys):
    assert main(["push", str(folder), "someone/digits"]) == 0
    assert "someone/digits" in capsys.readouterr().out
    for path in folder.rglob("*"):
        if path.is_file():
            assert hub.files[path.relative_to(folder).as_posix()] == path.read_bytes()
    assert {token for path, token in hub.asked if "yaml" not in path} == {"Bearer hf_of_a_test"}


def test_push_without_a_token_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(folder), "someone/digits"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "HF_TOKEN" in error


def test_push_refuses_a_folder_without_a_model_before_it_asks_the_hub(tmp_path, hub):
    with pytest.raises(InputError, match="holds no model"):
        toolkit.push_model(tmp_path, "someone/digits")
    assert hub.asked == []
