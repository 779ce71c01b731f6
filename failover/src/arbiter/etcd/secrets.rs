//! Certificates, keys and the password: read from files, never from arguments or the environment.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use crate::config::EtcdSection;

/// Longest file of this kind, in bytes.
const MAX_BYTES: u64 = 256 * 1024;
/// Longest password, in bytes.
const MAX_PASSWORD: usize = 1024;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum SecretError {
    /// It cannot be read.
    #[error("{0}: {1}")]
    Unreadable(String, io::Error),
    /// Others than its owner may read or write it.
    #[error("{0}: mode {1:03o} lets others in: chmod 600 it")]
    Open(String, u32),
    /// It is not what it should be.
    #[error("{0}: {1}")]
    Wrong(String, String),
}

/// Who may read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Privacy {
    Public,
    OwnerOnly,
}

fn read(path: &Path, privacy: Privacy) -> Result<Vec<u8>, SecretError> {
    let place = || path.display().to_string();
    let unreadable = |error| SecretError::Unreadable(place(), error);
    // Opening a FIFO that someone put there must not hang.
    let nonblock = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).expect("O_NONBLOCK fits");
    let file = OpenOptions::new().read(true).custom_flags(nonblock).open(path).map_err(unreadable)?;
    let info = file.metadata().map_err(unreadable)?;
    if !info.is_file() {
        return Err(SecretError::Wrong(place(), "not a regular file".into()));
    }
    if privacy == Privacy::OwnerOnly && info.mode() & 0o077 != 0 {
        return Err(SecretError::Open(place(), info.mode() & 0o777));
    }
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_BYTES) {
        return Err(SecretError::Wrong(place(), format!("longer than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// The password in `path`: the file's only line.
pub(super) fn password(path: &Path) -> Result<String, SecretError> {
    let wrong = |cause: &str| SecretError::Wrong(path.display().to_string(), cause.into());
    let text = String::from_utf8(read(path, Privacy::OwnerOnly)?).map_err(|_| wrong("not UTF-8 text"))?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() || line.len() > MAX_PASSWORD || line.chars().any(char::is_control) {
        return Err(wrong("must hold the password on one line, and nothing else"));
    }
    Ok(line.to_owned())
}

/// How this side speaks TLS. What the files hold is checked here: the HTTP client takes it for granted.
pub(super) fn tls(section: &EtcdSection) -> Result<TlsConfig, SecretError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // Without a configured authority nobody is trusted; only http:// endpoints work then, as the configuration's check says.
    let mut roots = Vec::new();
    if let Some(ca) = &section.ca {
        roots = certificates(ca)?;
        let mut store = rustls::RootCertStore::empty();
        let (_, ignored) = store.add_parsable_certificates(roots.iter().cloned());
        if ignored > 0 {
            return Err(SecretError::Wrong(ca.display().to_string(), "holds what is no certificate".into()));
        }
    }
    let client = match (&section.cert, &section.key) {
        (Some(cert), Some(key)) => Some(client_cert(cert, key, &provider)?),
        _ => None,
    };
    let roots: Vec<Certificate<'static>> =
        roots.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::from(roots))
        .client_cert(client)
        .unversioned_rustls_crypto_provider(provider)
        .build())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, SecretError> {
    let wrong = |cause: String| SecretError::Wrong(path.display().to_string(), cause);
    let bytes = read(path, Privacy::Public)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(|error| wrong(format!("not PEM: {error}")))?;
    if found.is_empty() { Err(wrong("holds no certificate in PEM".into())) } else { Ok(found) }
}

fn client_cert(cert: &Path, key: &Path, provider: &CryptoProvider) -> Result<ClientCert, SecretError> {
    let wrong = |cause: String| SecretError::Wrong(key.display().to_string(), cause);
    let chain = certificates(cert)?;
    let pem = read(key, Privacy::OwnerOnly)?;
    let der = PrivateKeyDer::from_pem_slice(&pem).map_err(|error| wrong(format!("no private key in PEM: {error}")))?;
    CertifiedKey::from_der(chain.clone(), der, provider)
        .map_err(|error| wrong(format!("does not belong to {}: {error}", cert.display())))?;
    let chain: Vec<_> = chain.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    let key = PrivateKey::from_pem(&pem).map_err(|error| wrong(error.to_string()))?;
    Ok(ClientCert::new_with_certs(&chain, key))
}
