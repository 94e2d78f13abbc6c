"""The first-Mac protocol: one run that answers what could only be guessed without a Mac, as one JSON document.

`protocol.run_protocol` plays the sections of `sections.SECTIONS`; `docs/first-mac.md` says what each answer decides.
"""
