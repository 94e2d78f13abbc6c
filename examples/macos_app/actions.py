"""What buttons, menu items and keys send: each goes to the model or the window. Methods are Objective-C selectors."""

from typing import TYPE_CHECKING

from AppKit import NSMenuItem, NSObject, NSTextView

if TYPE_CHECKING:
    from chat_model import ChatModel
    from window import ChatWindow

NEW_CHAT, STOP, REGENERATE, EDIT_LAST = 1, 2, 3, 4  # tags of menu items; 0 is any other


class Actions(NSObject):
    """The target of every control; `model` and `window` are set once both are there."""

    model: "ChatModel"
    window: "ChatWindow"

    def choose_(self, sender: object) -> None:
        at = self.window.chosen
        if at >= 0:
            self.model.choose(at)

    def send_(self, sender: object) -> None:
        if self.model.chat is not None:
            self.model.chat.send(self.window.take_input())

    def stop_(self, sender: object) -> None:
        self.model.stop()

    def regenerate_(self, sender: object) -> None:
        if self.model.chat is not None:
            self.model.chat.regenerate()

    def editLast_(self, sender: object) -> None:
        if self.model.chat is not None:
            self.model.chat.edit_last()

    def newChat_(self, sender: object) -> None:
        self.model.new_chat()

    def validateMenuItem_(self, item: NSMenuItem) -> bool:
        """AppKit asks before it shows or triggers an item."""
        can = self.model.can
        needed = {NEW_CHAT: can.new_chat, STOP: can.stop, REGENERATE: can.regenerate, EDIT_LAST: can.edit}
        return needed.get(item.tag(), True)

    def textView_doCommandBySelector_(self, view: NSTextView, selector: "str | bytes") -> bool:
        """Return sends, Option-Return begins a line, Escape leaves an edit."""
        # Versions of PyObjC differ in whether a selector is text or bytes.
        name = selector.decode() if isinstance(selector, bytes) else str(selector)
        if name == "insertNewline:":
            self.send_(view)
            return True
        if name == "cancelOperation:" and self.model.chat is not None:
            self.model.chat.leave_edit()
            return True
        return False
