"""Does polarity predict the change of entropy, and what does? PROTOCOL.md says how it is asked."""
