"""The site configuration's ``modelConfiguration``: as written, and what it means."""

from proxy.modelconfig.resolver import resolve as resolve
