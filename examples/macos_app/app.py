"""MTP Chat: a window to talk to Gemma 4. Starts AppKit and joins the logic (`chat_model`) to the window (`window`)."""

from collections.abc import Callable
from pathlib import Path

from actions import Actions
from AppKit import (
    NSApplication,
    NSApplicationActivationPolicyRegular,
    NSBundle,
    NSObject,
    NSRunLoop,
    NSRunLoopCommonModes,
    NSTerminateLater,
    NSTimer,
    NSUserDefaults,
)
from chat_model import ChatModel
from menus import menu_bar
from PyObjCTools import AppHelper
from window import ChatWindow

LAST_MODEL = "lastModel"


class AppKitThread:
    """AppKit's main thread as a `MainThread`."""

    def soon(self, call: Callable[[], None]) -> None:
        AppHelper.callAfter(call)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        # In the common modes, so that text goes on coming while a menu is open or the window is scrolled.
        timer = NSTimer.timerWithTimeInterval_repeats_block_(seconds, False, lambda timer: call())
        NSRunLoop.mainRunLoop().addTimer_forMode_(timer, NSRunLoopCommonModes)


class Defaults:
    """What is remembered between launches, in the user's defaults."""

    @property
    def last_model(self) -> str | None:
        value = NSUserDefaults.standardUserDefaults().stringForKey_(LAST_MODEL)
        return None if value is None else str(value)

    @last_model.setter
    def last_model(self, value: str | None) -> None:
        NSUserDefaults.standardUserDefaults().setObject_forKey_(value, LAST_MODEL)


class Delegate(NSObject):
    """AppKit's application delegate."""

    window: ChatWindow
    model: ChatModel

    def applicationDidFinishLaunching_(self, notification: object) -> None:
        actions = Actions.alloc().init()
        self.window = ChatWindow(actions)
        self.model = ChatModel(self.window, AppKitThread(), Defaults(), resources())
        actions.model, actions.window = self.model, self.window
        app = NSApplication.sharedApplication()
        app.setMainMenu_(menu_bar(actions))
        self.window.show()
        app.activateIgnoringOtherApps_(True)
        self.model.start()

    def applicationShouldTerminate_(self, app: NSApplication) -> int:
        """Quitting while a reply is written: it is cancelled, which takes a round, and the model is freed first."""
        self.model.quit(lambda: app.replyToApplicationShouldTerminate_(True))
        return NSTerminateLater

    def applicationShouldTerminateAfterLastWindowClosed_(self, app: NSApplication) -> bool:
        return True


def resources() -> Path | None:
    """The bundle's Resources, where models may lie; None where this is run as a script."""
    path = NSBundle.mainBundle().resourcePath()
    return None if path is None else Path(str(path))


def main() -> None:
    app = NSApplication.sharedApplication()
    app.setActivationPolicy_(NSApplicationActivationPolicyRegular)
    delegate = Delegate.alloc().init()  # AppKit keeps no reference to it
    app.setDelegate_(delegate)
    AppHelper.runEventLoop(installInterrupt=True)


if __name__ == "__main__":
    main()
