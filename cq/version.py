"""The version, alone, so that packaging and headers read it without importing anything."""

VERSION = "0.1.0"
