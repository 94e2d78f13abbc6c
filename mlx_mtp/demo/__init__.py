"""The demo pair: a tiny target and its MTP drafter in Gemma 4's shape.

Made by `examples/train_demo_pair`; MODEL_CARD.md says what it is and what was measured.
"""
