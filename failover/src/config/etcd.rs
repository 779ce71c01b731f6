//! `[arbiter] kind = "etcd"`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ureq::http::Uri;

use super::check::{Wrong, shown, span_within, wrong};
use super::{format_span, units};

/// Most endpoints; etcd itself advises against clusters of more than seven members.
const MAX_ENDPOINTS: usize = 9;
/// Longest prefix and user name, in bytes.
const MAX_NAME: usize = 256;

/// An etcd cluster, reached through its JSON gateway (on the client port).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdSection {
    /// The members' client URLs, `https://host:2379`, the nearest first. All of one cluster.
    pub endpoints: Vec<String>,
    /// The record's key is this, the VM's id, and `/record`.
    #[serde(default = "default_prefix")]
    pub prefix: String,
    /// Certificates (PEM) of the authority that signed the members' certificates. A relative path starts at the configuration file.
    pub ca: Option<PathBuf>,
    /// This side's certificate chain (PEM), if the members ask for one.
    pub cert: Option<PathBuf>,
    /// Its private key (PEM), readable by its owner only.
    pub key: Option<PathBuf>,
    /// User of etcd, if it knows users.
    pub user: Option<String>,
    /// File with the user's password on one line, readable by its owner only.
    pub password_file: Option<PathBuf>,
    /// A request counts as lost after this.
    #[serde(default = "default_timeout", with = "units::span")]
    pub timeout: Duration,
    /// An endpoint that takes no connection within this is passed over.
    #[serde(default = "default_connect_timeout", with = "units::span")]
    pub connect_timeout: Duration,
    /// The etcd cluster's id in hexadecimal, as `etcdctl endpoint status -w fields` has it. Any when absent: the first that answers.
    pub cluster_id: Option<String>,
    /// Accept endpoints that are neither loopback nor `https://`: whoever is on the way could then let two guests run.
    #[serde(default)]
    pub insecure_lab: bool,
}

fn default_prefix() -> String {
    "/ft/".into()
}

fn default_timeout() -> Duration {
    Duration::from_secs(1)
}

fn default_connect_timeout() -> Duration {
    Duration::from_millis(250)
}

/// What is to be known of an endpoint.
struct Endpoint {
    https: bool,
    loopback: bool,
}

fn endpoint(text: &str) -> Option<Endpoint> {
    let uri: Uri = text.parse().ok()?;
    let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
    uri.port_u16().filter(|port| *port != 0)?;
    let plain = uri.path() == "/" && uri.query().is_none() && !text.contains('@') && !text.ends_with('/');
    let https = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    (plain && !host.is_empty()).then_some(Endpoint { https, loopback })
}

impl EtcdSection {
    /// The configured cluster id as a number.
    pub fn cluster(&self) -> Option<u64> {
        self.cluster_id.as_ref().and_then(|text| u64::from_str_radix(text, 16).ok())
    }

    fn https(&self) -> bool {
        self.endpoints.iter().all(|text| endpoint(text).is_some_and(|endpoint| endpoint.https))
    }

    pub(super) fn resolve(&mut self, directory: &Path) {
        for path in [&mut self.ca, &mut self.cert, &mut self.key, &mut self.password_file].into_iter().flatten() {
            *path = directory.join(&*path);
        }
    }

    pub(super) fn check(&self) -> Result<(), Wrong> {
        self.check_endpoints()?;
        self.check_names()?;
        let both = |one: bool, other: bool, names: &str| {
            if one == other { Ok(()) } else { Err(wrong(format!("arbiter.{names}"), "only one of the two is there")) }
        };
        both(self.cert.is_some(), self.key.is_some(), "cert, key")?;
        both(self.user.is_some(), self.password_file.is_some(), "user, password_file")?;
        if self.https() != self.ca.is_some() {
            let cause = "https:// endpoints need it, and http:// endpoints have no use for it";
            return Err(wrong("arbiter.ca", cause));
        }
        if self.cert.is_some() && !self.https() {
            return Err(wrong("arbiter.cert", "http:// endpoints have no use for it"));
        }
        span_within("arbiter.timeout", self.timeout, Duration::from_millis(50), Duration::from_secs(10))?;
        span_within("arbiter.connect_timeout", self.connect_timeout, Duration::from_millis(10), self.timeout)
    }

    fn check_endpoints(&self) -> Result<(), Wrong> {
        let key = "arbiter.endpoints";
        if self.endpoints.is_empty() || self.endpoints.len() > MAX_ENDPOINTS {
            return Err(wrong(key, format!("{} endpoints: 1 to {MAX_ENDPOINTS} are possible", self.endpoints.len())));
        }
        for (at, text) in self.endpoints.iter().enumerate() {
            let Some(Endpoint { https, loopback }) = endpoint(text) else {
                return Err(wrong(key, format!("{} is none: write it like \"https://10.0.0.1:2379\"", shown(text))));
            };
            if self.endpoints[..at].contains(text) {
                return Err(wrong(key, format!("{} is there twice", shown(text))));
            }
            if https != self.https() {
                return Err(wrong(key, "some are https://, some are http://: all or none"));
            }
            if !https && !loopback && !self.insecure_lab {
                let cause = format!(
                    "{} is neither https:// nor loopback: whoever is on the way could let two guests run; use https://, or say insecure_lab = true",
                    shown(text)
                );
                return Err(wrong(key, cause));
            }
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), Wrong> {
        let graphic = |text: &str| text.len() <= MAX_NAME && text.bytes().all(|byte| byte.is_ascii_graphic());
        if !graphic(&self.prefix) || !self.prefix.starts_with('/') || !self.prefix.ends_with('/') {
            return Err(wrong("arbiter.prefix", "must begin and end with '/', without spaces: \"/ft/\""));
        }
        if self.user.as_ref().is_some_and(|user| user.is_empty() || !graphic(user)) {
            return Err(wrong("arbiter.user", format!("1 to {MAX_NAME} letters, digits and signs")));
        }
        let hex = |text: &String| text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if self.cluster_id.as_ref().is_some_and(|text| !hex(text))
            || self.cluster_id.is_some() && self.cluster().is_none_or(|id| id == 0)
        {
            return Err(wrong("arbiter.cluster_id", "not 1 to 16 hexadecimal digits (without 0x)"));
        }
        Ok(())
    }

    /// What follows from it, for people.
    pub(super) fn derived(&self) -> String {
        let safety = match (self.https(), &self.cert) {
            (true, Some(_)) => "TLS, both sides show certificates",
            (true, None) => "TLS, the members show certificates",
            (false, _) if self.insecure_lab => "INSECURE (insecure_lab = true): neither authenticated nor encrypted",
            (false, _) => "loopback only, in the clear",
        };
        let count = self.endpoints.len();
        let members = match count {
            1 => "one endpoint: while it is away nothing is armed".to_owned(),
            2 => "2 endpoints: a cluster of two members stops when either does; three survive one".to_owned(),
            _ => format!("{count} endpoints, asked in this order until one answers"),
        };
        format!(
            "arbiter: etcd, {members}; {safety}\n\
             an endpoint that takes no connection is passed over after {}; an answer counts as lost after {}",
            format_span(self.connect_timeout),
            format_span(self.timeout)
        )
    }
}
