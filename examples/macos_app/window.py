"""The window: views and nothing else. Colours are the system's, so that dark mode and contrast settings apply."""

from collections.abc import Callable, Sequence

from actions import Actions
from AppKit import (
    NSAlert,
    NSAlertFirstButtonReturn,
    NSAttributedString,
    NSBackingStoreBuffered,
    NSButton,
    NSColor,
    NSFont,
    NSFontAttributeName,
    NSForegroundColorAttributeName,
    NSLayoutAttributeLeading,
    NSLineBreakByTruncatingTail,
    NSMakeRange,
    NSMakeRect,
    NSMakeSize,
    NSMaxY,
    NSPopUpButton,
    NSProgressIndicator,
    NSScrollView,
    NSStackView,
    NSTextField,
    NSTextView,
    NSUserInterfaceLayoutOrientationHorizontal,
    NSUserInterfaceLayoutOrientationVertical,
    NSView,
    NSWindow,
    NSWindowStyleMaskClosable,
    NSWindowStyleMaskMiniaturizable,
    NSWindowStyleMaskResizable,
    NSWindowStyleMaskTitled,
)
from model_list import ModelRow
from view import Can, Turn
from words import Problem

MARGIN, GAP = 16.0, 8.0
INPUT_HEIGHT, TRANSCRIPT_HEIGHT = 72.0, 240.0
NEAR_END = 40.0  # points from the transcript's end within which it follows new text
NAMES = {"user": "You", "assistant": "Gemma"}


class ChatWindow:
    """A `View`; every method is called on the main thread."""

    def __init__(self, actions: Actions):
        self._choices = NSPopUpButton.alloc().initWithFrame_pullsDown_(NSMakeRect(0, 0, 400, 26), False)
        self._choices.setTarget_(actions)
        self._choices.setAction_("choose:")
        self._choices.setAccessibilityLabel_("Model")
        self._cancel = _button("Cancel", actions, "stop:", "Cancel the download or load")
        self._bar = NSProgressIndicator.alloc().init()
        self._bar.setMaxValue_(1.0)
        self._bar.setAccessibilityLabel_("Progress")
        self._progress = _label("Progress in words")
        self._text = _text_view("Conversation", is_editable=False)
        self._input = _text_view("Message", is_editable=True)
        self._input_view().setDelegate_(actions)
        self._status = _label("Figures of the reply")
        self._stop = _button("Stop", actions, "stop:", "Stop the reply")
        self._again = _button("Regenerate", actions, "regenerate:", "Answer the last message again")
        self._send = _button("Send", actions, "send:", "Send the message")
        self._progress_row = _row(self._bar, self._progress, self._cancel)
        self.window = self._make_window()
        self.window.setDelegate_(actions)
        self.show_progress(None, None)

    def show(self) -> None:
        """Bring the window to the front, with the cursor in the input."""
        self.window.makeKeyAndOrderFront_(None)
        self.window.makeFirstResponder_(self._input_view())

    def take_input(self) -> str:
        """What was typed."""
        return str(self._input_view().string())

    @property
    def chosen(self) -> int:
        """The picker's row."""
        return self._choices.indexOfSelectedItem()

    # View

    def show_models(self, rows: Sequence[ModelRow], selected: int | None) -> None:
        self._choices.removeAllItems()
        for row in rows:  # one by one: titles that are alike would replace one another
            self._choices.menu().addItemWithTitle_action_keyEquivalent_(row.line, None, "")
        self._choices.selectItemAtIndex_(-1 if selected is None else selected)

    def show_can(self, can: Can) -> None:
        self._choices.setEnabled_(can.choose)
        self._cancel.setEnabled_(can.cancel_load)
        self._stop.setEnabled_(can.stop and not can.cancel_load)
        self._again.setEnabled_(can.regenerate)
        self._send.setEnabled_(can.send)
        self._cancel.setHidden_(not can.cancel_load)

    def show_progress(self, text: str | None, share: float | None) -> None:
        self._progress_row.setHidden_(text is None)
        self._progress.setStringValue_(text or "")
        self._bar.setIndeterminate_(share is None)
        if share is not None:
            self._bar.setDoubleValue_(share)
        if text is not None and share is None:
            self._bar.startAnimation_(None)
        else:
            self._bar.stopAnimation_(None)

    def show_status(self, text: str) -> None:
        self._status.setStringValue_(text)
        self._status.setToolTip_(text)

    def show_turns(self, turns: Sequence[Turn]) -> None:
        self._transcript().setString_("")
        for turn in turns:
            start = "" if turn is turns[0] else "\n\n"
            self._append(f"{start}{NAMES[turn.role]}\n", NSColor.secondaryLabelColor())
            self._append(turn.text, NSColor.labelColor())
        self._to_end()

    def add_text(self, text: str, *, is_thought: bool) -> None:
        follows = self._is_near_end()
        self._append(text, NSColor.secondaryLabelColor() if is_thought else NSColor.labelColor())
        if follows:
            self._to_end()

    def show_input(self, text: str) -> None:
        self._input_view().setString_(text)

    def give_back(self, text: str) -> None:
        typed = self.take_input()
        self.show_input(f"{text}\n{typed}" if typed else text)

    def show_problem(self, problem: Problem) -> None:
        alert = _alert(problem.title, problem.message)
        alert.addButtonWithTitle_("OK")
        alert.beginSheetModalForWindow_completionHandler_(self.window, lambda answer: None)

    def ask(self, title: str, text: str, button: str, then: Callable[[bool], None]) -> None:
        alert = _alert(title, text)
        alert.addButtonWithTitle_(button)
        alert.addButtonWithTitle_("Cancel")
        alert.beginSheetModalForWindow_completionHandler_(
            self.window, lambda answer: then(answer == NSAlertFirstButtonReturn)
        )

    # Parts

    def _make_window(self) -> NSWindow:
        parts = [
            self._choices,
            self._progress_row,
            self._text,
            self._input,
            self._status,
            _row(self._stop, self._again, self._send),
        ]
        stack = NSStackView.stackViewWithViews_(parts)
        stack.setOrientation_(NSUserInterfaceLayoutOrientationVertical)
        stack.setAlignment_(NSLayoutAttributeLeading)
        stack.setSpacing_(GAP)
        stack.setEdgeInsets_((MARGIN, MARGIN, MARGIN, MARGIN))
        for part in parts[:-1]:
            part.widthAnchor().constraintEqualToAnchor_constant_(stack.widthAnchor(), -2 * MARGIN).setActive_(
                True
            )
        self._input.heightAnchor().constraintEqualToConstant_(INPUT_HEIGHT).setActive_(True)
        least = self._text.heightAnchor().constraintGreaterThanOrEqualToConstant_(TRANSCRIPT_HEIGHT)
        least.setActive_(True)
        style = (
            NSWindowStyleMaskTitled
            | NSWindowStyleMaskClosable
            | NSWindowStyleMaskMiniaturizable
            | NSWindowStyleMaskResizable
        )
        window = NSWindow.alloc().initWithContentRect_styleMask_backing_defer_(
            NSMakeRect(0, 0, 720, 640), style, NSBackingStoreBuffered, False
        )
        window.setTitle_("MTP Chat")
        window.setContentView_(stack)
        window.setMinSize_(NSMakeSize(480, 420))
        window.setReleasedWhenClosed_(False)
        window.center()
        window.setFrameAutosaveName_("chat")
        return window

    def _transcript(self) -> NSTextView:
        return self._text.documentView()

    def _input_view(self) -> NSTextView:
        return self._input.documentView()

    def _append(self, text: str, colour: NSColor) -> None:
        attributes = {NSFontAttributeName: _font(), NSForegroundColorAttributeName: colour}
        added = NSAttributedString.alloc().initWithString_attributes_(text, attributes)
        self._transcript().textStorage().appendAttributedString_(added)

    def _is_near_end(self) -> bool:
        """Whoever has scrolled up to read stays there."""
        text = self._transcript()
        return NSMaxY(text.visibleRect()) >= NSMaxY(text.bounds()) - NEAR_END

    def _to_end(self) -> None:
        text = self._transcript()
        text.scrollRangeToVisible_(NSMakeRange(text.textStorage().length(), 0))


def _font() -> NSFont:
    return NSFont.systemFontOfSize_(NSFont.systemFontSize())


def _button(title: str, actions: Actions, action: str, label: str) -> NSButton:
    button = NSButton.buttonWithTitle_target_action_(title, actions, action)
    button.setAccessibilityLabel_(label)
    return button


def _label(label: str) -> NSTextField:
    field = NSTextField.labelWithString_("")
    field.setTextColor_(NSColor.secondaryLabelColor())
    field.setLineBreakMode_(NSLineBreakByTruncatingTail)
    field.setAccessibilityLabel_(label)
    return field


def _text_view(label: str, *, is_editable: bool) -> NSScrollView:
    scroll = NSTextView.scrollableTextView()
    text = scroll.documentView()
    text.setEditable_(is_editable)
    text.setRichText_(False)
    text.setFont_(_font())
    text.setTextColor_(NSColor.labelColor())
    text.setBackgroundColor_(NSColor.textBackgroundColor())
    text.setAutomaticQuoteSubstitutionEnabled_(False)  # what is typed may be code
    text.setAccessibilityLabel_(label)
    text.setAllowsUndo_(is_editable)
    return scroll


def _row(*views: NSView) -> NSStackView:
    row = NSStackView.stackViewWithViews_(list(views))
    row.setOrientation_(NSUserInterfaceLayoutOrientationHorizontal)
    row.setSpacing_(GAP)
    return row


def _alert(title: str, text: str) -> NSAlert:
    alert = NSAlert.alloc().init()
    alert.setMessageText_(title)
    alert.setInformativeText_(text)
    return alert
