"""A browser with the dashboard in it, which watches that nothing goes wrong behind what is seen."""

import ctypes
import fcntl
import os
import queue
import socket
import struct
import threading
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import expect, sync_playwright

URL = os.environ["ICEBOX_URL"]
KEY = os.environ["ICEBOX_KEY"]
PICTURES = Path(os.environ["ICEBOX_PICTURES"])

# linux/sched.h, linux/sockios.h, linux/if.h
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 1

# For what happens sooner or later: on a machine that has much else to do, later.
PATIENCE_MS = 90_000
expect.set_options(timeout=PATIENCE_MS)

# Keeps what the page says for a moment, since a moment may be over before anybody looks.
SAID = """
  window.said = [];
  new MutationObserver((changes) => {
    for (const { addedNodes } of changes)
      for (const node of addedNodes)
        if (node.classList?.contains('message')) window.said.push(node.firstChild.textContent);
  }).observe(document, { childList: true, subtree: true });
"""

# The lowest contrast of text and what is behind it, as WCAG reckons it, of every text that is seen.
CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => [r, g, b].map((it) => it / 255)
    .map((it) => (it <= 0.03928 ? it / 12.92 : ((it + 0.055) / 1.055) ** 2.4))
    .reduce((sum, it, index) => sum + it * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    const layers = [];
    for (let it = element; it; it = it.parentElement) {
      const colour = rgba(getComputedStyle(it).backgroundColor);
      layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((under, [r, g, b, a]) =>
      [r, g, b].map((it, index) => it * a + under[index] * (1 - a)), [255, 255, 255]);
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest('.hidden, svg, noscript, option')) continue;
    if (element.closest('button:disabled')) continue;
    const [one, other] = [light(rgba(getComputedStyle(element).color)), light(behind(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) low.push(`${contrast.toFixed(2)}: ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  return [...new Set(low)];
}"""

# Controls that have no name for who cannot see them.
NAMELESS = """() => [...document.querySelectorAll('button, a[href], input, select, textarea, [role=img], img')]
  .filter((it) => it.checkVisibility() && !it.hasAttribute('alt'))
  .filter((it) => !(it.textContent.trim() || it.getAttribute('aria-label') || it.labels?.length || it.title))
  .map((it) => it.outerHTML.slice(0, 120))"""


class Dashboard:
    """One tab, signed in, and what is asked of it."""

    def __init__(self, browser):
        self.context = browser.new_context(viewport={"width": 1360, "height": 860}, accept_downloads=True)
        self.context.set_default_timeout(PATIENCE_MS)
        self.context.add_init_script(SAID)
        self.page = self.context.new_page()
        self.wrong = []
        self.expected = []
        self.page.on("pageerror", lambda error: self.wrong.append(f"exception: {error}"))
        self.page.on("console", self.heard)
        self.page.on("request", self.asked)

    def heard(self, message):
        if message.type in ("error", "warning") and not any(it in message.text for it in self.expected):
            self.wrong.append(f"{message.type}: {message.text}")

    def asked(self, request):
        # INV-43: addresses end up in logs and histories.
        if KEY in request.url or "token" in request.url.lower():
            self.wrong.append(f"a secret in {request.url}")
        if not request.url.startswith((URL, "blob:")):
            self.wrong.append(f"another host is asked: {request.url}")

    def sign_in(self):
        self.page.goto(f"{URL}/test")
        self.page.get_by_label("API key").fill(KEY)
        self.page.get_by_role("button", name="Sign in").click()
        expect(self.page.get_by_role("heading", name="Sandboxes")).to_be_visible()
        expect(self.page.get_by_text("Live", exact=True)).to_be_visible()

    def click(self, name, within=None, exact=True):
        (within or self.page).get_by_role("button", name=name, exact=exact).click()

    def link(self, name, within=None, exact=True):
        (within or self.page).get_by_role("link", name=name, exact=exact).click()

    def dialog(self):
        return self.page.get_by_role("dialog")

    def row(self, name):
        return self.page.get_by_role("row").filter(has=self.page.get_by_role("rowheader").filter(has_text=name))

    def heading(self, name):
        expect(self.page.get_by_role("heading", name=name, level=1)).to_be_visible()

    def said(self, text):
        """Waits until the page has said something, whether or not it still shows it."""
        self.page.wait_for_function("text => window.said.includes(text)", arg=text)

    def state(self, word):
        expect(self.page.locator(".bar .pill")).to_have_text(word)

    def picture(self, name):
        """Keeps what is seen, in light and dark, and looks at what can be measured of it."""
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            self.page.screenshot(path=PICTURES / f"{name}-{scheme}.png")
            low = self.page.evaluate(CONTRAST)
            assert not low, f"{name}, {scheme}: too little contrast: {low}"
        nameless = self.page.evaluate(NAMELESS)
        assert not nameless, f"{name}: controls without a name: {nameless}"

    def close(self):
        self.context.close()
        assert not self.wrong, self.wrong


def browser(playwright):
    # No sandbox: it needs what root in a container has not, and all that is shown is ours.
    return playwright.chromium.launch(
        executable_path=os.environ["ICEBOX_CHROMIUM"],
        args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
    )


def carry(source, to):
    """Copies one direction of a connection to its end."""
    try:
        while part := source.recv(1 << 16):
            to.sendall(part)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        # Whoever is left is told, as by a connection that is cut.
        for side in (source, to):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def forward(listeners, address):
    """Carries connections to where the daemon listens, in the network that this thread began in."""
    listener = listeners.get()
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(address)
        for ends in ((near, far), (far, near)):
            threading.Thread(target=carry, args=ends, daemon=True).start()


def leave_the_network():
    """Puts this thread, and the browser that it starts, into a network of their own, with the daemon at its address in it.

    Chromium cuts its connections when an interface of its network comes or goes (ERR_NETWORK_CHANGED), and those of
    sandboxes do so all the time.
    """
    daemon = urlsplit(URL)
    address = (daemon.hostname, daemon.port)
    listeners = queue.SimpleQueue()
    threading.Thread(target=forward, args=(listeners, address), daemon=True).start()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    with socket.socket() as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", IFF_UP))
    listeners.put(socket.create_server(address, backlog=128))


def run(*stories):
    PICTURES.mkdir(parents=True, exist_ok=True)
    leave_the_network()
    with sync_playwright() as playwright:
        chromium = browser(playwright)
        for story in stories:
            dashboard = Dashboard(chromium)
            try:
                story(dashboard)
            except BaseException:
                dashboard.page.screenshot(path=PICTURES / "failed.png")
                print(f"{story.__name__} failed at {dashboard.page.url}; failed.png shows it; {dashboard.wrong}", flush=True)
                raise
            dashboard.close()
            print(f"{story.__name__}: ok", flush=True)
        chromium.close()
