"""The menu bar. Items without a target go to whichever view has the cursor, such as Copy."""

from actions import EDIT_LAST, NEW_CHAT, REGENERATE, STOP, Actions
from AppKit import NSMenu, NSMenuItem

# Title, selector, key with Command, tag; None is a line between items.
Entry = tuple[str, str, str, int] | None

APP: list[Entry] = [
    ("About MTP Chat", "orderFrontStandardAboutPanel:", "", 0),
    None,
    ("Hide MTP Chat", "hide:", "h", 0),
    None,
    ("Quit MTP Chat", "terminate:", "q", 0),
]
FILE: list[Entry] = [("New Chat", "newChat:", "n", NEW_CHAT), None, ("Close", "performClose:", "w", 0)]
EDIT: list[Entry] = [
    ("Undo", "undo:", "z", 0),
    ("Redo", "redo:", "Z", 0),
    None,
    ("Cut", "cut:", "x", 0),
    ("Copy", "copy:", "c", 0),
    ("Paste", "paste:", "v", 0),
    ("Select All", "selectAll:", "a", 0),
]
REPLY: list[Entry] = [
    ("Stop", "stop:", ".", STOP),
    ("Regenerate", "regenerate:", "r", REGENERATE),
    ("Edit Last Message", "editLast:", "e", EDIT_LAST),
]
WINDOW: list[Entry] = [("Minimize", "performMiniaturize:", "m", 0)]
MENUS = (("MTP Chat", APP), ("File", FILE), ("Edit", EDIT), ("Reply", REPLY), ("Window", WINDOW))


def menu_bar(actions: Actions) -> NSMenu:
    """All menus."""
    bar = NSMenu.alloc().initWithTitle_("")
    for title, entries in MENUS:
        item = bar.addItemWithTitle_action_keyEquivalent_(title, None, "")
        item.setSubmenu_(_menu(title, entries, actions))
    return bar


def _menu(title: str, entries: list[Entry], actions: Actions) -> NSMenu:
    menu = NSMenu.alloc().initWithTitle_(title)
    for entry in entries:
        if entry is None:
            menu.addItem_(NSMenuItem.separatorItem())
            continue
        name, selector, key, tag = entry
        item = menu.addItemWithTitle_action_keyEquivalent_(name, selector, key)
        if tag:
            item.setTag_(tag)
            item.setTarget_(actions)
    return menu
