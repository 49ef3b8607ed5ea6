"""The core: pure, without commands or a terminal. See ARCHITECTURE.md."""
