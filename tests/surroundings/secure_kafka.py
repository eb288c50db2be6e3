"""A broker that requires a password over TLS, with a second listener whose certificate has expired."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives import serialization

from k2flow.sandbox.kafka.local import LocalKafka, free_port

USER, PASSWORD = "flows", "correct horse battery staple"
ITERATIONS = 4096  # Kafka's minimum


@dataclass(frozen=True)
class SecureKafka:
    """A real Kafka with SASL_SSL (SCRAM-SHA-512) at `secure`, and at `expired` with a certificate of last year.

    `local` is the same broker without either, as an administrator on its machine reaches it. `authority` is the file
    with the certificate of the authority that signed both others.
    """

    local: LocalKafka
    secure: str
    expired: str
    authority: Path

    def client(self, bootstrap: str | None = None) -> dict[str, str]:
        """Return the variables that a flow needs to connect, except the password."""
        return {
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": bootstrap or self.secure,
            "K2FLOW_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "K2FLOW_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "K2FLOW_KAFKA_SASL_USERNAME": USER,
            "K2FLOW_KAFKA_SSL_CA_LOCATION": str(self.authority),
        }


def secure_kafka(folder: Path) -> SecureKafka:
    """Prepare the broker, without starting it; `folder` gets its data and certificates."""
    folder.mkdir(parents=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    now = datetime.now(UTC)
    certificates = {
        "secure": authority.issue_cert("127.0.0.1"),
        "expired": authority.issue_cert(
            "127.0.0.1", not_before=now - timedelta(days=365), not_after=now - timedelta(days=1)
        ),
    }
    addresses = {name: f"127.0.0.1:{free_port()}" for name in certificates}
    listeners = ",".join(f"{name.upper()}://{address}" for name, address in addresses.items())
    properties = {
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL,EXPIRED:SASL_SSL",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "allow.everyone.if.no.acl.found": "true",
    }
    for name, certificate in certificates.items():
        path = folder / f"{name}.pem"
        path.write_bytes(_pkcs8(certificate.private_key_pem.bytes()) + certificate.cert_chain_pems[0].bytes())
        path.chmod(0o600)
        properties |= {
            f"listener.name.{name}.ssl.keystore.type": "PEM",
            f"listener.name.{name}.ssl.keystore.location": str(path),
            f"listener.name.{name}.scram-sha-512.sasl.jaas.config": (
                "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            ),
        }
    local = LocalKafka(folder / "kafka", free_port(), properties=properties)
    return SecureKafka(local, addresses["secure"], addresses["expired"], folder / "authority.pem")


def create_user(kafka: SecureKafka) -> None:
    """Create the user of the flows, with its password; the broker must run."""
    admin = AdminClient({"bootstrap.servers": kafka.local.bootstrap})
    how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, ITERATIONS)
    wanted = UserScramCredentialUpsertion(USER, how, PASSWORD.encode())
    for done in admin.alter_user_scram_credentials([wanted]).values():
        done.result(30)


@contextmanager
def denied(kafka: SecureKafka, topic: str, operation: AclOperation) -> Iterator[None]:
    """Deny the user of the flows an operation on a topic."""
    admin = AdminClient({"bootstrap.servers": kafka.local.bootstrap})
    place = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation)
    for done in admin.create_acls([AclBinding(*place, AclPermissionType.DENY)]).values():
        done.result(30)
    yield
    for done in admin.delete_acls([AclBindingFilter(*place, AclPermissionType.DENY)]).values():
        done.result(30)


def _pkcs8(key: bytes) -> bytes:
    """Convert a private key to the form that Java reads."""
    private = serialization.load_pem_private_key(key, None)
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
