"""The example for Kubernetes: what is wrong with it, and how a kubelet would run its sidecar.

    pod.py check FILE                 a line for each thing that is wrong, and 1
    pod.py run FILE CONFIG            as variables for bash; CONFIG is the image's, as JSON

An unknown field, a wrong type or an unknown kind is the schema's to find; a volume that nobody has, or
a sidecar that is none, fits the schema and is found here.
"""

import json
import shlex
import sys

import kubernetes_validate
import yaml

# The first that knows sidecars without being asked, and the newest whose schema is at hand.
VERSIONS = ["1.29", kubernetes_validate.latest_version()]
SOCKETS, STATE = "/run/tallyd", "/var/lib/tallyd"


def against_schema(document: dict) -> list[str]:
    wrong = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(str(part) for part in error.path)
            wrong.append(f"{document['kind']}, Kubernetes {version}: {path}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            wrong.append(error.message)
    return wrong


def read(path: str) -> tuple[list[dict], list[str]]:
    with open(path, encoding="utf-8") as file:
        documents = [document for document in yaml.safe_load_all(file) if document]
    return documents, [line for document in documents for line in against_schema(document)]


class Pod:
    """The pod of the one StatefulSet, which fits the schema."""

    def __init__(self, documents: list[dict]):
        (self.set,) = (d for d in documents if d["kind"] == "StatefulSet")
        self.spec = self.set["spec"]["template"]["spec"]
        (self.sidecar,) = (c for c in self.spec["initContainers"] if c["name"] == "tallyd")
        (self.application,) = self.spec["containers"]
        self.volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        for claim in self.set["spec"]["volumeClaimTemplates"]:
            self.volumes[claim["metadata"]["name"]] = {"claim": claim["spec"]}

    def mounted(self, container: dict, path: str) -> dict:
        """The volume at a path; {} for none."""
        names = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == path]
        return self.volumes.get(names[0], {}) if names else {}

    def probes(self) -> dict[str, str]:
        """By kind: port and path."""
        ports = {port["name"]: port["containerPort"] for port in self.sidecar["ports"]}
        probes = {}
        for kind in ["startup", "liveness", "readiness"]:
            get = self.sidecar[f"{kind}Probe"]["httpGet"]
            probes[kind] = f"{ports.get(get['port'], get['port'])}{get['path']}"
        return probes

    def wrong(self) -> list[str]:
        labels = self.set["spec"]["template"]["metadata"]["labels"]
        expected = {
            "the sidecar stays": self.sidecar.get("restartPolicy") == "Always",
            "the selector finds the pods": self.set["spec"]["selector"]["matchLabels"] == labels,
            "the state outlives the pod": "claim" in self.mounted(self.sidecar, STATE),
            "a state directory has one daemon": self.mounted(self.sidecar, STATE).get("claim", {}).get("accessModes")
            == ["ReadWriteOncePod"],
            "the socket's directory is shared": "emptyDir" in self.mounted(self.sidecar, SOCKETS)
            and self.mounted(self.sidecar, SOCKETS) is self.mounted(self.application, SOCKETS),
            "the kernel's interface is confined": self.spec["securityContext"].get("seccompProfile")
            == {"type": "RuntimeDefault"},
            "the probes' ports have numbers": all(port[0].isdigit() for port in self.probes().values()),
        }
        for container in [self.sidecar, self.application]:
            name, security = container["name"], container["securityContext"]
            expected |= {
                f"{name} is not root": security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0,
                f"{name} writes to volumes alone": security.get("readOnlyRootFilesystem") is True,
                f"{name} has no capabilities": security.get("capabilities") == {"drop": ["ALL"]},
                f"{name} gains no privileges": security.get("allowPrivilegeEscalation") is False,
                f"{name} mounts what there is": all(m["name"] in self.volumes for m in container["volumeMounts"]),
            }
        return [f"not so: {what}" for what, so in expected.items() if not so]

    def run(self, image: dict) -> dict[str, str | list[str]]:
        """What a kubelet makes of the sidecar and the image's configuration."""
        security, image = self.sidecar["securityContext"], image["config"]
        environment = dict(variable.split("=", 1) for variable in image["Env"])
        environment |= {variable["name"]: variable["value"] for variable in self.sidecar["env"]}
        command = self.sidecar.get("command", image["Entrypoint"]) + self.sidecar.get("args", image["Cmd"])
        return {
            "image_user": image["User"],
            "user": str(security["runAsUser"]),
            "group": str(security["runAsGroup"]),
            "fs_group": str(self.spec["securityContext"]["fsGroup"]),
            "application": str(self.application["securityContext"]["runAsUser"]),
            "grace_s": str(self.spec["terminationGracePeriodSeconds"]),
            "host": f"{self.set['metadata']['name']}-0",
            "environment": [f"{name}={value}" for name, value in environment.items()],
            "command": command,
            "health": image["Healthcheck"]["Test"][1:],
            "mounts": [
                f"{next(kind for kind in self.volumes[m['name']] if kind != 'name')}:{m['mountPath']}"
                for m in self.sidecar["volumeMounts"]
            ],
            "probes": list(self.probes().values()),
        }


def main(what: str, path: str, *image: str) -> int:
    documents, wrong = read(path)
    # What does not fit the schema cannot be looked into.
    wrong = wrong or Pod(documents).wrong()
    for line in wrong:
        print(f"{path}: {line}")
    if wrong:
        return 1
    if what == "run":
        with open(image[0], encoding="utf-8") as file:
            told = Pod(documents).run(json.load(file))
        for name, value in told.items():
            quoted = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
            print(f"{name}={quoted}")
    else:
        kinds = ", ".join(document["kind"] for document in documents)
        print(f"{path}: {kinds}: as Kubernetes {' and '.join(VERSIONS)} have it")
    return 0


sys.exit(main(*sys.argv[1:]))
