"""Chromium, driven by its WebDriver server (https://www.w3.org/TR/webdriver2/)."""

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    def __init__(self, url):
        self.url = url
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,760", "--hide-scrollbars"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = f"/session/{self._ask('POST', '/session', {'capabilities': {'alwaysMatch': wanted}})['sessionId']}"

    def _ask(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def post(self, path, **body):
        return self._ask("POST", self.session + path, body)

    def close(self):
        self._ask("DELETE", self.session)

    def open(self, url):
        self.post("/url", url=url)

    def run(self, script, *arguments):
        """Run JavaScript, and return what it returns."""
        return self.post("/execute/sync", script=script, args=arguments)

    def find(self, css):
        return f"/element/{self.post('/element', using='css selector', value=css)[ELEMENT]}"

    def type(self, css, text):
        self.post(f"{self.find(css)}/value", text=text)

    def click(self, css):
        self.post(f"{self.find(css)}/click")

    def text(self, css):
        return self.run("return Array.from(document.querySelectorAll(arguments[0]), (found) => found.textContent)", css)

    def wait(self, condition, seconds=60):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"not within {seconds} s: {condition}; {self.log()}"
            time.sleep(0.05)

    def log(self):
        return [line["message"] for line in self.post("/se/log", type="browser")]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self._ask("GET", f"{self.session}/screenshot")))


@contextlib.contextmanager
def browser():
    """A new browser. Fails if Chromium or its driver is not installed."""
    driver = shutil.which("chromedriver")
    assert driver, "chromedriver is missing; on Debian: apt install chromium chromium-driver"
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(line.split()[-1].rstrip(".") for line in process.stdout if "started successfully on port" in line)
        made = Browser(f"http://127.0.0.1:{port}")
        try:
            yield made
        finally:
            made.close()
    finally:
        process.kill()
        process.wait()
