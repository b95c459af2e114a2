"""A stand-in for W&B's server, for what is online only; W&B's client and its background process are the real ones."""

import contextlib
import gzip
import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

from cdc_mmpg.training import wandb_record
from cdc_mmpg.training.cli import main


class Server(ThreadingHTTPServer):
    """The part of W&B's server that its client needs: it receives runs, and hands out the runs of one sweep.

    Args:
        commands: parameters of the sweep's runs, by run.
        known: whether the API key is accepted.
        silent: whether it stops responding once a run has begun.
    """

    daemon_threads = True

    def __init__(
        self, commands: dict[str, dict[str, object]] | None = None, known: bool = True, silent: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commands, self.known, self.silent = list((commands or {}).items()), known, silent
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.begun: dict[str, dict[str, object]] = {}  # settings at the start of a run, by run
        self.summaries: dict[str, dict[str, object]] = {}
        self.histories: dict[str, list[dict[str, object]]] = {}
        self.sweeps: list[dict[str, object]] = []
        self.artifacts: list[dict[str, Any]] = []  # type, name, aliases, id: the same content has the same id
        self.used: list[tuple[str, str]] = []  # run, and id of an artifact that it used
        self.alerts: list[dict[str, object]] = []
        self.views: list[dict[str, object]] = []
        self.unknown: set[str] = set()
        self.closing = threading.Event()

    def list_artifacts(self, kind: str) -> list[str]:
        """Return the names of the artifacts of a type, in the order in which runs logged or used them."""
        return [artifact["name"] for artifact in self.artifacts if artifact["type"] == kind]

    def describe_artifact(self, identity: str, project: dict[str, object]) -> dict[str, object]:
        logged = next(artifact for artifact in self.artifacts if artifact["id"] == identity)
        return {
            "id": identity, "artifactSequence": {"name": logged["name"], "project": {**project, "internalId": "P"}},
            "artifactType": {"name": logged["type"]}, "digest": identity.partition(":")[2], "state": "COMMITTED",
            "versionIndex": 0, "size": 0, "fileCount": 1, "ttlDurationSeconds": -2, "ttlIsInherited": False,
            "createdAt": "2030-01-01T00:00:00Z", "tags": [], "aliases": [], "metadata": "{}",
            **dict.fromkeys(("description", "historyStep", "updatedAt", "commitHash")),
        }  # fmt: skip

    def reply(self, name: str, variables: dict[str, object]) -> object:  # noqa: PLR0911, PLR0912  one branch per query
        project = {"id": "P", "name": "cdc-mmpg", "entity": {"id": "E", "name": "me"}}
        if name == "Viewer" and self.known:
            return {"viewer": {"id": "V", "username": "me", "entity": "me", "email": "", "flags": "{}",
                               "teams": {"edges": []}}}  # fmt: skip
        if name == "UpsertBucket":
            self.begun.setdefault(variables["name"], variables)
            bucket = {"id": "B", "name": variables["name"], "displayName": "x", "project": project,
                      "sweepName": variables["sweep"], "historyLineCount": 0}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if name == "CreateRunFiles":
            files = [
                {"name": file, "uploadUrl": f"{self.url}/{variables['run']}/{file}"} for file in variables["files"]
            ]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if name == "UpsertSweep":
            self.sweeps.append(yaml.safe_load(variables["config"]))
            return {"upsertSweep": {"sweep": {"name": "sweep1", "project": project}, "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            return {"project": {"sweep": {"id": "S", "name": "sweep1", "config": yaml.safe_dump(self.sweeps[-1]),
                                          "runs": {"edges": []}}}}  # fmt: skip
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": "A"}}}
        if name == "Heartbeat":
            commands = []
            if not json.loads(variables["runState"]):
                commands = [{"type": "exit"}]
                if self.commands:
                    run, parameters = self.commands.pop(0)
                    arguments = {key: {"value": value} for key, value in parameters.items()}
                    commands = [{"type": "run", "run_id": run, "args": arguments, "program": None}]
            return {"agentHeartbeat": {"agent": {"id": "A"}, "commands": json.dumps(commands)}}
        if name == "CreateArtifact":
            given: Any = variables["input"]
            identity = f"{given['artifactCollectionName']}:{given['digest']}"
            aliases = [alias["alias"] for alias in given["aliases"]]
            self.artifacts.append({"type": given["artifactTypeName"], "aliases": aliases,
                                   "name": given["artifactCollectionName"], "id": identity,
                                   "metadata": json.loads(given["metadata"] or "{}")})  # fmt: skip
            sequence = {"id": "Q", "latestArtifact": None}
            artifact = {"id": identity, "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if name == "ArtifactByID":
            return {"artifact": self.describe_artifact(str(variables["id"]), project)}
        if name == "GetDefaultEntity":
            return {"viewer": {"id": "V", "entity": "me"}}
        if name == "UseArtifact":
            use: Any = variables["input"]
            self.used.append((use["runName"], use["artifactID"]))
            return {"useArtifact": {"artifact": {"id": use["artifactID"]}}}
        if name == "NotifyScriptableRunAlert":
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "UpsertView2":
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "W", "name": variables["name"]}, "inserted": True}}
        self.unknown.add(name)
        return {"model": None, "project": None, "entity": None, "viewer": None}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        reply: object = {}
        if self.server.silent and self.server.begun:
            self.server.closing.wait()
            return
        if self.path == "/graphql":
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            reply = {"data": self.server.reply(name, request.get("variables") or {})}
        elif self.path.endswith("wandb-summary.json"):
            self.server.summaries[self.path.split("/")[1]] = json.loads(body)
        elif self.path.endswith("file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.histories.setdefault(self.path.split("/")[-2], []).extend(map(json.loads, lines))
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)


@contextlib.contextmanager
def serve(**arguments: object) -> Iterator[Server]:
    server = Server(**arguments)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def run_online(command: list[str], url: str, **environment: str) -> int:
    os.environ.pop("WANDB_MODE", None)  # the key alone enables W&B
    os.environ |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40} | environment
    wandb_record.UPLOAD_SECONDS = 3
    return main(command)
