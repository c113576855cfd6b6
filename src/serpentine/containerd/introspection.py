"""What a daemon is made of and can do."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.empty_pb2 import Empty

from serpentine.containerd._proto import introspection_pb2 as pb
from serpentine.containerd.channel import Channel
from serpentine.containerd.types import PluginInfo
from serpentine.errors import Unimplemented
from serpentine.model.platform import Platform

__all__ = ["Introspection"]

_SERVICE = "/containerd.services.introspection.v1.Introspection/"
_CONTENT = "io.containerd.content.v1"
_SNAPSHOTTER = "io.containerd.snapshotter.v1"


class Introspection:
    """Plugins, their capabilities, and the daemon's own platform."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def plugins(self, filters: Sequence[str] = ()) -> list[PluginInfo]:
        """Return all plugins that match one of the filters, or all."""
        request = pb.PluginsRequest(filters=filters)
        answer = await self._channel.unary(_SERVICE + "Plugins", request, pb.PluginsResponse)
        return [_plugin(plugin) for plugin in answer.plugins]

    async def server_id(self) -> str:
        """Return what containerd calls itself: an identifier that stays with its root directory."""
        answer = await self._channel.unary(_SERVICE + "Server", Empty(), pb.ServerResponse)
        return answer.uuid

    async def snapshotters(self) -> list[PluginInfo]:
        """Return the snapshotters that work."""
        found = await self.plugins([f"type=={_SNAPSHOTTER}"])
        return [plugin for plugin in found if plugin.init_error is None]

    async def capabilities(self, snapshotter: str) -> tuple[str, ...]:
        """Return what a snapshotter can do besides what all can, as ``rebase``."""
        found = await self.plugins([f"type=={_SNAPSHOTTER},id=={snapshotter}"])
        return next((plugin.capabilities for plugin in found if plugin.init_error is None), ())

    async def roots(self, snapshotter: str) -> list[str]:
        """Return the directories of blobs and of a snapshotter, as far as containerd tells them."""
        found = await self.plugins([f"type=={_CONTENT}", f"type=={_SNAPSHOTTER},id=={snapshotter}"])
        roots = {plugin.type: plugin.exports.get("root", "") for plugin in found}
        return [root for kind in (_CONTENT, _SNAPSHOTTER) if (root := roots.get(kind))]

    async def host_platform(self) -> Platform:
        """Return the platform of the machine that containerd runs on.

        Raises Unimplemented if no plugin names one.
        """
        # Every snapshotter and runtime names the platform that it was started for.
        plugins = await self.plugins()
        for kind in ("io.containerd.runtime.v2", _SNAPSHOTTER, ""):
            for plugin in plugins:
                if plugin.platforms and plugin.type.startswith(kind):
                    return plugin.platforms[0].normalized()
        raise Unimplemented(
            "this containerd does not tell its platform", hint="give one with --platform"
        )


def _plugin(plugin: pb.Plugin) -> PluginInfo:
    failed = plugin.HasField("init_err") and (plugin.init_err.message or "failed to start")
    return PluginInfo(
        type=plugin.type,
        id=plugin.id,
        platforms=tuple(
            Platform(p.os, p.architecture, p.variant, p.os_version) for p in plugin.platforms
        ),
        capabilities=tuple(plugin.capabilities),
        exports=dict(plugin.exports),
        init_error=failed or None,
    )
