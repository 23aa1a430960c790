"""The reference server: what clients get, a clear error for every bad request, and limits."""

import contextlib
import io
import json
import socket
import threading
import time
from http.server import ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxinterp import Network, attacks, cli, models, typesetting
from jaxinterp.apis import BadAnswer, HTTPVision, Label, LocalVision, Server, ServiceError, as_model, asking
from jaxinterp.apis import ocr as engines
from jaxinterp.data import Crop
from jaxinterp.data.decode import crop_pixels
from jaxinterp.weights import seeded

NAMES = ("dark", "bright", "red")


class Brightness:
    """Sees how bright and how red an image is, without JAX; reads its size."""

    def labels(self, image):
        values = np.asarray(image, np.float64) / (255 if image.dtype == np.uint8 else 1)
        mean, red = values.mean(), values[..., 0].mean() - values[..., 1:].mean()
        scores = np.exp(40 * np.array([0.5 - mean, mean - 0.5, 0.2 * red]))
        return tuple(sorted(map(Label, NAMES, (scores / scores.sum()).tolist()), key=lambda label: -label.score))

    def text(self, image):
        return (f"{image.shape[0]} x {image.shape[1]}",)


class Failing:
    """A service with a defect."""

    def labels(self, image):
        raise RuntimeError("a secret inside")

    def text(self, image):
        raise ServiceError("this service has no OCR engine", 501)


@contextlib.contextmanager
def serving(api, **settings):
    server = Server(api, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def service():
    with serving(Brightness(), timeout=0.4, max_bytes=100_000, max_pixels=10_000, about={"model": "mean"}) as server:
        yield server


def connected(server):
    return socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=5)


def ask(server, request, *, end=False):
    """Status, headers and JSON of the answer to the bytes of a request."""
    with connected(server) as connection:
        connection.sendall(request)
        if end:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
                head, split, body = answer.partition(b"\r\n\r\n")
                length = next((int(x[16:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length:")), 0)
                if split and len(body) >= length:
                    break
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), json.loads(body)


def post(path="/labels", body=b"", **headers):
    fields = {"Host": "here", "Content_Type": "image/png", "Content_Length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value is not None)
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def png(width=8, height=6, mode="RGB"):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(150, 256, (height, width), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, format="PNG")
    return stream.getvalue()


def test_client_and_server_agree(service, rng):
    image = rng.random((9, 7, 3), np.float32)
    exact = np.rint(image * 255).astype(np.uint8)
    with HTTPVision(service.url, retries=0) as api:
        assert api.labels(image) == Brightness().labels(exact)
        assert api.text(image) == ("9 x 7",)
    status, headers, about = ask(service, b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert about == {"service": "jaxinterp", "labels": True, "text": True, "model": "mean"}


def test_any_picture_format_will_do(service):
    for form, kind in (("JPEG", "image/jpeg"), ("WEBP", "image/webp"), ("BMP", "application/octet-stream")):
        stream = io.BytesIO()
        Image.new("RGB", (8, 6), (250, 250, 250)).save(stream, format=form)
        status, _, answer = ask(service, post(body=stream.getvalue(), Content_Type=kind))
        assert (status, answer["labels"][0]["name"]) == (200, "bright")
    assert ask(service, post(body=png(mode="L"), Content_Type=None))[0] == 200


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (post("/faces", png()), 404, "POST /labels, POST /text and GET /, and nothing else"),
        (post("/", png()), 405, "/ takes GET only"),
        (b"GET /labels HTTP/1.1\r\nHost: here\r\n\r\n", 405, "/labels takes POST only"),
        (b"DELETE /labels HTTP/1.1\r\nHost: here\r\n\r\n", 405, "DELETE"),
        (post(body=png(), Content_Type="application/json"), 415, "must be a picture"),
        (post(body=b"", Content_Length=None), 411, "length of the body is needed"),
        (post(body=b"", Content_Length="many"), 400, "Content-Length is not a number"),
        (post(body=b"", Content_Length="-4"), 400, "Content-Length is not a number"),
        (post(body=b"", Content_Length="9" * 4000), 400, "Content-Length is not a number"),
        (post(body=b"", Content_Length="100001"), 413, "larger than 100000 bytes"),
        (post(body=b""), 400, "the body is empty"),
        (post(body=b"not a picture"), 400, "could not be read: not a picture"),
        (post(body=png(20, 20)[:200]), 400, "could not be read: damaged"),
        (post(body=png(101, 100)), 413, "101 x 100 is more than 10000 pixels"),
        (b"nonsense\r\n\r\n", 400, "nonsense"),
        (b"GET / HTTP/7.1\r\n\r\n", 505, "7.1"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414, "Long"),
        (post(body=png(), X="a" * 70_000), 431, "Line too long"),
    ],
)
def test_bad_requests(service, request_, status, message):
    found, headers, answer = ask(service, request_)
    assert found == status
    assert set(answer) == {"error"}
    assert message in answer["error"]
    assert headers["Connection"] == "close" or status in (200,)
    assert ask(service, post(body=png()))[0] == 200  # it goes on


@pytest.mark.parametrize("field", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_the_body_of_a_get_is_not_taken_for_a_request(service, field):
    body = b"hello" + post(body=png())
    with connected(service) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n" + field + b"\r\n\r\n" + body)
        answers = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answers += part
    assert answers.startswith(b"HTTP/1.1 200")
    assert answers.count(b"HTTP/1.1 ") == 1


def test_a_picture_that_is_cut_short_or_too_slow(service):
    body = png()
    half = post(body=body)[: -len(body) // 2]
    status, _, answer = ask(service, half, end=True)
    assert (status, answer["error"].split(" at ")[0]) == (400, "the body was cut short")
    begun = time.monotonic()
    status, _, answer = ask(service, half)
    assert status == 408
    assert time.monotonic() - begun < 4  # less than the client's own time


@pytest.mark.parametrize("start", [b"POST /lab", b"POST /labels HTTP/1.1\r\nX: ", post(body=png())[:-60]])
def test_a_request_that_comes_byte_by_byte_has_one_deadline(service, start):
    with connected(service) as connection:
        connection.sendall(start)
        connection.settimeout(0.05)
        end, answer = time.monotonic() + 4, b""
        while not answer.endswith(b"}") and time.monotonic() < end:
            if not answer:
                connection.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the request did not arrive within 0.4 seconds" in answer


def test_what_is_left_of_a_refused_request_is_not_waited_for_for_long(service):
    with connected(service) as connection:
        connection.sendall(post("/faces", png()))
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < begun + 4:
                connection.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() < begun + 4


def test_an_idle_connection_is_ended_without_an_answer(service):
    with connected(service) as connection:
        assert connection.recv(65536) == b""


def test_defects_and_missing_engines_are_said_without_details(capsys):
    with serving(Failing()) as server:
        status, _, answer = ask(server, post(body=png()))
        assert (status, answer) == (500, {"error": "the service failed"})
        status, _, answer = ask(server, post("/text", png()))
        assert (status, answer) == (501, {"error": "this service has no OCR engine"})
        with (
            HTTPVision(server.url, retries=0) as api,
            pytest.raises(ServiceError, match="501: this service has no OCR"),
        ):
            api.text(np.zeros((4, 4, 3)))
    assert "RuntimeError: a secret inside" in capsys.readouterr().err


def test_requests_need_the_key(monkeypatch):
    monkeypatch.setenv("SERVICE_KEY", "sesame")
    said = []
    with serving(Brightness(), key_variable="SERVICE_KEY", say=said.append) as server:
        for given in ({}, {"Authorization": "Bearer other"}, {"Authorization": "sesame"}):
            assert ask(server, post(body=png(), **given))[0] == 401
        assert ask(server, b"GET / HTTP/1.1\r\n\r\n")[0] == 401
        with HTTPVision(server.url, key_variable="SERVICE_KEY") as api:
            assert api.labels(np.ones((4, 4, 3)))[0].name == "bright"
        assert ask(server, post("/labels?key=sesame", png(), Authorization="Bearer sesame"))[0] == 404
        monkeypatch.setenv("SERVICE_KEY", "")
        assert ask(server, post(body=png(), Authorization="Bearer "))[0] == 401  # no key is no key
    assert len(said) == 7
    assert '"POST /labels?... HTTP/1.1" 404' in said[5]
    assert "sesame" not in " ".join(said)
    monkeypatch.delenv("SERVICE_KEY")
    with pytest.raises(ValueError, match="'SERVICE_KEY', which is to hold the key, is not set"):
        Server(Brightness(), key_variable="SERVICE_KEY")


def test_more_connections_than_allowed_are_told_to_come_again():
    with serving(Brightness(), connections=1, timeout=5) as server:
        with connected(server) as waiting:
            waiting.sendall(b"POST /labels HTTP/1.1\r\n")
            time.sleep(0.1)
            status, headers, answer = ask(server, post(body=png()))
            assert (status, headers["Retry-After"]) == (503, "1")
            assert answer == {"error": "too many connections at once"}
        end = time.monotonic() + 5
        while ask(server, post(body=png()))[0] != 200:
            assert time.monotonic() < end


def test_a_port_that_is_taken_and_bad_settings():
    with serving(Brightness()) as server, pytest.raises(OSError, match="in use"):
        Server(Brightness(), port=server.server_address[1])
    for settings, message in (
        ({"port": 65536}, "port must be from 0 to 65535"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"connections": 0}, "connections must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Server(Brightness(), **settings)  # type: ignore[arg-type]


# A network as a service, a service as a network


def mean_network(scale=20.0):
    def apply(params, images):
        mean, red = images.mean((1, 2, 3)), images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))
        return params * jnp.stack([0.5 - mean, mean - 0.5, 0.2 * red], axis=1)

    network = Network(name="mean", apply=apply, image_size=16, classes=NAMES, crop_pct=0.5)
    return network, jnp.float32(scale)


def test_a_network_ranks_its_classes(rng):
    network, params = mean_network()
    api = LocalVision(network, params, top=2)
    image = rng.random((16, 16, 3), np.float32)
    seen = np.rint(image * 255).astype(np.float32) / 255
    scores = np.asarray(jax.nn.softmax(network.bind(params)(seen[None])))[0]
    order = np.argsort(-scores)[:2]
    found = api.labels(image)
    assert [label.name for label in found] == [NAMES[i] for i in order]
    np.testing.assert_allclose([label.score for label in found], scores[order], rtol=1e-5)
    with pytest.raises(ServiceError, match="no OCR engine"):
        api.text(image)
    # Another size is resized and cropped as the network's pictures are.
    other = (rng.random((40, 60, 3)) ** 3 * 255).astype(np.uint8)
    cropped = crop_pixels(other, Crop(16, 0.5, "bicubic"))
    expected = np.asarray(jax.nn.softmax(network.bind(params)(cropped[None])))[0].max()
    np.testing.assert_allclose(api.labels(other)[0].score, expected, rtol=1e-5)
    with pytest.raises(ServiceError, match="not finite"):
        LocalVision(network, jnp.float32(np.nan)).labels(image)
    with pytest.raises(ValueError, match="top must be at least 1"):
        LocalVision(network, params, top=0)
    grey = models.network("carlini_mnist")
    with pytest.raises(ValueError, match="carlini_mnist does not take RGB images"):
        LocalVision(grey, seeded.params(models.shapes("carlini_mnist")))


def test_an_attack_on_a_service_is_the_attack_on_what_is_behind_it(rng):
    """Through PNG and HTTP: the images of an attack on 8-bit scores are found with as many requests as it counts."""
    images = np.rint(rng.uniform(0.46, 0.49, (3, 16, 16, 3)) * 255).astype(np.float32) / 255
    labels = np.zeros(3, np.int32)
    attack = attacks.TransparentText(text="go", opacity=0.6, colour="white", queries=9, population=1)
    attack = typesetting.written(attack, 16, 16)
    key = jax.random.key(0)
    said = []
    with serving(Brightness(), say=said.append) as server, HTTPVision(server.url, retries=0) as api:
        model = as_model(api, NAMES)
        found = [attacks.run(attack, model, images[i : i + 1], labels[:1], key=key) for i in range(3)]
        found = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
    assert len(said) == found.forward.sum()

    def direct(images):
        mean, red = images.mean((1, 2, 3)), images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))
        return 40 * jnp.stack([0.5 - mean, mean - 0.5, 0.2 * red], axis=1)

    expected = attacks.run(attack, direct, images, labels, key=key)
    assert found.success.any()
    np.testing.assert_array_equal(found.success, expected.success)
    np.testing.assert_array_equal(found.forward, expected.forward)
    np.testing.assert_array_equal(found.images, expected.images)


def test_a_service_that_fails_under_an_attack_raises_its_own_error():
    class Busy:
        asked = 0

        def labels(self, image):
            self.asked += 1
            if self.asked > 2:
                raise ServiceError("too many requests", 429)
            return (Label("dark", 0.9), Label("bright", 0.1))

        def text(self, image):
            return ()

    model = as_model(Busy(), NAMES)
    images, labels = jnp.full((1, 16, 16, 3), 0.4), np.zeros(1, np.int32)
    attack = attacks.TransparentText(text="go", queries=9, population=1)
    with pytest.raises(ServiceError, match="too many requests") as caught, asking(model):
        attacks.run(typesetting.written(attack, 16, 16), model, images, labels, key=jax.random.key(0))
    assert caught.value.status == 429
    model.func.failure = None
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"), asking(model):
        raise jax.errors.JaxRuntimeError("another")


def test_labels_that_are_not_named_are_ruled_out_and_shared_names_are_shared():
    class Fixed:
        def labels(self, image):
            return (Label("crane", 0.7), Label("ghost", 0.2), Label("dog", 0.0))

        def text(self, image):
            return ()

    logits = as_model(Fixed(), ("cat", "crane", "dog", "crane"))(jnp.zeros((2, 4, 4, 3)))
    row = [-np.inf, np.log(0.7), np.log(1e-12), np.log(0.7)]
    np.testing.assert_allclose(logits, [row, row], rtol=1e-6)
    with pytest.raises(ValueError, match="at least two names"):
        as_model(Fixed(), ("cat",))


def test_scores_without_a_logarithm_are_refused():
    """Of two negative ones the order would be lost."""

    class Logits(Failing):
        def labels(self, image):
            return (Label("dog", -1.0), Label("cat", -5.0))

    model = as_model(Logits(), ("cat", "dog"))
    with (
        pytest.raises(BadAnswer, match="scores must not be negative to have logarithms, got -1 of 'dog'"),
        asking(model),
    ):
        jax.block_until_ready(model(jnp.zeros((1, 4, 4, 3))))


# The command


def test_serve_answers_and_ends(monkeypatch, capsys):
    """With a seeded network in place of converted weights."""
    from jaxinterp import weights

    seen = []

    def one_question(server):
        thread = threading.Thread(target=ThreadingHTTPServer.serve_forever, args=(server, 0.02), daemon=True)
        thread.start()
        with HTTPVision(server.url, retries=0) as api:
            seen.extend(api.labels(np.ones((16, 16, 3), np.float32)))
        seen.append(ask(server, b"GET / HTTP/1.1\r\n\r\n")[2])
        server.shutdown()
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "load", lambda name: mean_network())
    monkeypatch.setattr(Server, "serve_forever", one_question)
    assert cli.main(["serve", "--model", "mean", "--port", "0", "--top", "2"]) == 0
    assert [label.name for label in seen[:2]] == ["bright", "red"]
    about = {"service": "jaxinterp", "model": "mean", "size": 16, "classes": 3, "labels": True, "text": False}
    assert seen[2] == about
    printed = capsys.readouterr()
    assert "mean: labels at http://127.0.0.1:" in printed.out
    assert '"POST /labels HTTP/1.1" 200' in printed.out
    assert not printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet5"], "unknown model 'resnet5'"),
        (
            ["--ocr"],
            "no OCR engine is installed: pip install 'jaxinterp[ocr]' (with Python below 3.13), or apt-get install",
        ),
        (["--ocr", "--engine", "tesseract"], "the OCR engine tesseract is not installed: apt-get install"),
        (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
        (["--top", "0"], "top must be at least 1"),
        (["--key-variable", "NO_KEY_HERE"], "'NO_KEY_HERE', which is to hold the key, is not set"),
    ],
)
def test_serve_refuses(arguments, message, monkeypatch, capsys):
    from jaxinterp import weights

    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    if arguments[0] != "--model":
        monkeypatch.setattr(weights, "load", lambda name: mean_network())
    assert cli.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
