"""A hub that cannot be reached: one error, soon, and nothing else on the screen."""

import http.server
import socket
import threading

import pytest
import torch
from huggingface_hub import constants

import toolkit
from toolkit.backbones.checkpoints import opening
from toolkit.baselines import contrastive, generative
from toolkit.errors import InputError
from toolkit.files import answers


@pytest.mark.parametrize(
    "load",
    [
        lambda: toolkit.build_backbone("vit_small", 5),
        lambda: toolkit.build_backbone("vim_small", 5),
        lambda: contrastive.load("ViT-B-32:laion2b_s34b_b79k", dtype=torch.float32),
        lambda: contrastive.load("ViT-B-16-SigLIP:webli", dtype=torch.float32),
        lambda: generative.load("HuggingFaceTB/SmolVLM-256M-Instruct", "smolvlm", dtype=torch.float32),
        lambda: generative.load("mtgv/MobileVLM_V2-1.7B", "mobilevlm", dtype=torch.float32),
    ],
    ids=["timm", "own backbone", "open_clip", "tokenizer", "transformers", "snapshot"],
)
def test_whatever_loads_from_the_hub_asks_it_once(load, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []
    monkeypatch.setattr("toolkit.backbones.checkpoints.answers", asked.append)  # returns None: no answer
    with pytest.raises(InputError, match=r"cannot be loaded .*cannot be reached.* Connect to the Hugging"):
        load()
    assert asked and set(asked) == {constants.ENDPOINT}
    assert not any(capfd.readouterr())
    assert constants.HF_HUB_OFFLINE is False


def test_a_hub_that_answers_and_a_local_folder_are_not_taken_for_silent(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for source, answer in (("timm/vit", True), (tmp_path, False), ("local-dir:nowhere", False)):
        monkeypatch.setattr("toolkit.backbones.checkpoints.answers", lambda url, answer=answer: answer)
        with opening(source):
            assert not constants.HF_HUB_OFFLINE
        with pytest.raises(InputError, match="OSError: damaged"), opening(source):
            raise OSError("damaged")


def test_servers_that_refuse_answer_and_silent_ones_do_not(monkeypatch):
    monkeypatch.setattr("toolkit.files.REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not answers(f"http://127.0.0.1:{silent.getsockname()[1]}/")
    assert not answers("https://huggingface.co")  # no network in tests
    monkeypatch.setattr("toolkit.files.REACH_SECONDS", 60)
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501
    server.RequestHandlerClass.log_message = lambda *_: None
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert answers(f"http://127.0.0.1:{server.server_port}/")
    server.server_close()
