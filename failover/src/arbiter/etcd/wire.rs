//! What is said to etcd's JSON gateway and what it answers: bytes in, typed outcome out. No I/O; whatever the bytes, nothing panics.
//!
//! Keys and values travel in base64, 64-bit numbers as strings, and a field with the value zero or false is left out. So an empty object looks
//! like *no record*, or like *compared unequal*: an answer counts only with its header, and a compare-and-swap only with the response of
//! the branch that it claims to have taken.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::arbiter::{MAX_RECORD_BYTES, Record, RecordError, Revision, Versioned};
use crate::text::harmless;

/// Longest reply that is read, in bytes: the longest record in base64, and room for what surrounds it.
pub const MAX_REPLY_BYTES: usize = MAX_RECORD_BYTES.div_ceil(3) * 4 + 8 * 1024;
/// Longest token that is taken, in bytes; it comes back in a header of every request.
const MAX_TOKEN_BYTES: usize = 4096;
/// Longest piece of a foreign text in a message, in characters.
const MAX_EXCERPT: usize = 120;

/// A request: where to, and the JSON to post. Without a body it is a GET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Path below the endpoint.
    pub path: &'static str,
    /// JSON.
    pub body: Option<String>,
}

impl Call {
    fn post(path: &'static str, body: &serde_json::Value) -> Self {
        Self { path, body: Some(body.to_string()) }
    }

    /// Asks for a key. Linearizable: `serializable` is never set.
    pub fn range(key: &str) -> Self {
        Self::post("/v3/kv/range", &json!({ "key": BASE64.encode(key) }))
    }

    /// Stores `record` if the key's `mod_revision` is `expected` (`None`: if there is no such key). `None` when no stored revision can be that.
    pub fn swap(key: &str, expected: Option<Revision>, record: &Record) -> Option<Self> {
        // To etcd 0 means *no such key*: as a revision it must never be asked for.
        let mod_revision = match expected {
            None => 0,
            Some(Revision(0)) => return None,
            Some(Revision(revision)) => i64::try_from(revision).ok()?,
        };
        let key = BASE64.encode(key);
        Some(Self::post(
            "/v3/kv/txn",
            &json!({
                "compare": [{ "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": mod_revision.to_string() }],
                "success": [{ "request_put": { "key": key, "value": BASE64.encode(record.to_json()) } }],
                "failure": [{ "request_range": { "key": key, "keys_only": true } }],
            }),
        ))
    }

    /// Asks for a token.
    pub fn authenticate(user: &str, password: &str) -> Self {
        Self::post("/v3/auth/authenticate", &json!({ "name": user, "password": password }))
    }

    /// Asks for the server's version.
    pub fn version() -> Self {
        Self { path: "/version", body: None }
    }
}

/// An HTTP reply as it came, read up to one byte more than [`MAX_REPLY_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpReply {
    /// Status code.
    pub status: u16,
    /// `Content-Encoding`, if there was one.
    pub encoding: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// Why a reply is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplyError {
    /// Longer than [`MAX_REPLY_BYTES`].
    #[error("a reply of more than {MAX_REPLY_BYTES} bytes")]
    TooLong,
    /// Sent elsewhere; nobody goes there.
    #[error("HTTP {0} sends us elsewhere: name the right endpoint, redirects are not followed")]
    Redirect(u16),
    /// Compressed, though nobody asked for that.
    #[error("the reply is encoded as {0}, which was not asked for")]
    Encoded(String),
    /// Not JSON: a page of a proxy, a cut reply, another service.
    #[error("HTTP {status} and no JSON: {excerpt}")]
    NotJson {
        /// Status code.
        status: u16,
        /// How it begins.
        excerpt: String,
    },
    /// etcd said no.
    #[error("etcd answered: {message} (HTTP {status}, code {code})")]
    Refused {
        /// Status code.
        status: u16,
        /// gRPC's code; 2 (unknown) if there was none.
        code: i64,
        /// etcd's words.
        message: String,
    },
    /// JSON, but not of the form of the answer.
    #[error("not an answer of etcd: {0}")]
    Malformed(String),
    /// A key or value is not base64.
    #[error("{0} is not base64")]
    Base64(&'static str),
    /// What is stored is not a record that this program may act on.
    #[error("{0}")]
    Record(#[from] RecordError),
    /// The parts of the answer contradict each other or the question.
    #[error("contradictory answer: {0}")]
    Contradictory(&'static str),
}

/// What etcd says when it has *not* carried out a request, and will not: it refused before proposing it, or while applying it.
const CERTAINLY_NOT: [&str; 9] = [
    "etcdserver: invalid auth token",
    "etcdserver: user name is empty",
    "etcdserver: revision of auth store is old",
    "etcdserver: permission denied",
    "etcdserver: too many requests",
    "etcdserver: request is too large",
    "etcdserver: mvcc: database space exceeded",
    "etcdserver: authentication failed, invalid user ID or password",
    "etcdserver: authentication is not enabled",
];

impl ReplyError {
    fn says(&self, words: &[&str]) -> bool {
        matches!(self, Self::Refused { message, .. } if words.contains(&message.as_str()))
    }

    /// Whether the request was certainly not carried out and never will be. Everything else may have been, for all that one knows.
    pub fn certainly_not_done(&self) -> bool {
        self.says(&CERTAINLY_NOT)
    }

    /// Whether a new token may help: it expired, or the server that had issued it began anew.
    pub fn wants_new_token(&self) -> bool {
        self.says(&CERTAINLY_NOT[..3])
    }

    /// Whether etcd knows no users at all.
    pub fn knows_no_users(&self) -> bool {
        self.says(&["etcdserver: authentication is not enabled"])
    }

    /// Whether a person must look: repeating the request will not help.
    pub fn needs_a_person(&self) -> bool {
        match self {
            Self::Record(_) | Self::Base64(_) | Self::Contradictory(_) => true,
            Self::Refused { .. } => {
                let words = ["etcdserver: permission denied", CERTAINLY_NOT[7], CERTAINLY_NOT[1]];
                self.says(&words)
            }
            Self::TooLong | Self::Redirect(_) | Self::Encoded(_) | Self::NotJson { .. } | Self::Malformed(_) => false,
        }
    }
}

/// Who answered, and how far its store has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Header {
    /// The etcd cluster. Not the VM that a record calls `cluster_id`.
    #[serde(default, deserialize_with = "number")]
    pub cluster_id: u64,
    /// Revision of the whole store.
    #[serde(default, deserialize_with = "number")]
    pub revision: u64,
}

/// Answer to [`Call::range`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Who answered.
    pub header: Header,
    /// What is stored under the key.
    pub record: Option<Versioned>,
}

/// Answer to [`Call::swap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swapped {
    /// Who answered.
    pub header: Header,
    /// The record's new revision; `None`: compared unequal, nothing stored.
    pub applied: Option<Revision>,
}

#[derive(Deserialize)]
struct RangeBody {
    header: Header,
    #[serde(default)]
    kvs: Vec<KeyValue>,
    #[serde(default)]
    more: bool,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    key: String,
    #[serde(default, deserialize_with = "number")]
    mod_revision: u64,
    #[serde(default)]
    value: String,
}

#[derive(Deserialize)]
struct TxnBody {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

#[derive(Deserialize)]
struct Response {
    response_put: Option<serde::de::IgnoredAny>,
    response_range: Option<TxnRange>,
}

#[derive(Deserialize)]
struct TxnRange {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

/// 64-bit numbers are strings in this dialect; plain ones are understood as well.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Either;
    impl serde::de::Visitor<'_> for Either {
        type Value = u64;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a whole number that is not negative")
        }
        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<u64, E> {
            Ok(number)
        }
        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<u64, E> {
            text.parse().map_err(|_| E::custom(format!("not a whole number: {}", excerpt(text.as_bytes()))))
        }
    }
    deserializer.deserialize_any(Either)
}

/// The beginning of a foreign text, safe to print on one line.
fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(4 * MAX_EXCERPT)]);
    let short: String = text.chars().take(MAX_EXCERPT).collect();
    format!("{short:?}")
}

impl HttpReply {
    /// The body of a success, or what stands in its way.
    fn success(&self) -> Result<&[u8], ReplyError> {
        if self.body.len() > MAX_REPLY_BYTES {
            return Err(ReplyError::TooLong);
        }
        if (300..400).contains(&self.status) {
            return Err(ReplyError::Redirect(self.status));
        }
        if let Some(encoding) = self.encoding.as_deref().filter(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
            return Err(ReplyError::Encoded(excerpt(encoding.as_bytes())));
        }
        if let Some(refusal) = self.refusal() {
            return Err(refusal);
        }
        if self.status == 200 { Ok(&self.body) } else { Err(self.not_json()) }
    }

    /// An error of etcd, whatever the status says. Versions differ in where they put the words.
    fn refusal(&self) -> Option<ReplyError> {
        #[derive(Deserialize)]
        struct ErrorBody {
            error: Option<String>,
            message: Option<String>,
            code: Option<i64>,
        }
        let body: ErrorBody = serde_json::from_slice(&self.body).ok()?;
        if body.error.is_none() && body.message.is_none() && body.code.is_none() {
            return None;
        }
        let words = body.message.or(body.error).unwrap_or_default();
        let message: String = words.chars().filter(|c| !c.is_control()).take(MAX_EXCERPT).collect();
        Some(ReplyError::Refused { status: self.status, code: body.code.unwrap_or(2), message })
    }

    fn not_json(&self) -> ReplyError {
        ReplyError::NotJson { status: self.status, excerpt: excerpt(&self.body) }
    }

    fn parse<'a, T: Deserialize<'a>>(&'a self) -> Result<T, ReplyError> {
        let body = self.success()?;
        serde_json::from_slice(body).map_err(|error| {
            if error.is_data() { ReplyError::Malformed(harmless(&error.to_string())) } else { self.not_json() }
        })
    }

    /// Reads the answer to [`Call::range`] for `key`.
    ///
    /// # Errors
    /// [`ReplyError`] says what it is instead.
    pub fn found(&self, key: &str) -> Result<Found, ReplyError> {
        let RangeBody { header, mut kvs, more } = self.parse()?;
        header.check()?;
        let Some(entry) = kvs.pop() else {
            return Ok(Found { header, record: None });
        };
        if more || !kvs.is_empty() {
            return Err(ReplyError::Contradictory("more than one key"));
        }
        let KeyValue { key: their_key, mod_revision, value } = entry;
        check_key(&their_key, key)?;
        if mod_revision == 0 || mod_revision > header.revision {
            return Err(ReplyError::Contradictory("the key's revision is none of the store's"));
        }
        let bytes = BASE64.decode(value).map_err(|_| ReplyError::Base64("the value"))?;
        let record = Record::parse(&bytes)?;
        Ok(Found { header, record: Some(Versioned { revision: Revision(mod_revision), record }) })
    }

    /// Reads the answer to [`Call::swap`] of `key` at `expected`.
    ///
    /// # Errors
    /// [`ReplyError`]; unless it says [`ReplyError::certainly_not_done`], nobody knows whether the record was stored.
    pub fn swapped(&self, key: &str, expected: Option<Revision>) -> Result<Swapped, ReplyError> {
        let TxnBody { header, succeeded, mut responses } = self.parse()?;
        header.check()?;
        let (Some(response), true) = (responses.pop(), responses.is_empty()) else {
            return Err(ReplyError::Contradictory("not the one response of the branch that was taken"));
        };
        match (succeeded, response) {
            (true, Response { response_put: Some(_), response_range: None }) => {
                // The put made the revision that the header has.
                if header.revision <= expected.map_or(0, |revision| revision.0) {
                    return Err(ReplyError::Contradictory(
                        "stored at a revision that is not later than the one before",
                    ));
                }
                Ok(Swapped { header, applied: Some(Revision(header.revision)) })
            }
            (false, Response { response_put: None, response_range: Some(TxnRange { kvs }) }) => {
                let stored = match kvs.as_slice() {
                    [] => None,
                    [entry] => {
                        check_key(&entry.key, key)?;
                        Some(Revision(entry.mod_revision))
                    }
                    _ => return Err(ReplyError::Contradictory("more than one key")),
                };
                if stored == expected {
                    return Err(ReplyError::Contradictory("compared unequal, but the revision is the expected one"));
                }
                Ok(Swapped { header, applied: None })
            }
            _ => Err(ReplyError::Contradictory("the response belongs to the other branch")),
        }
    }

    /// Reads the answer to [`Call::authenticate`].
    ///
    /// # Errors
    /// [`ReplyError`].
    pub fn token(&self) -> Result<String, ReplyError> {
        #[derive(Deserialize)]
        struct TokenBody {
            token: String,
        }
        let TokenBody { token } = self.parse()?;
        let printable = token.bytes().all(|byte| byte.is_ascii_graphic());
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES || !printable {
            return Err(ReplyError::Malformed("the token cannot be put into a header".into()));
        }
        Ok(token)
    }

    /// Reads the answer to [`Call::version`].
    ///
    /// # Errors
    /// [`ReplyError`].
    pub fn version(&self) -> Result<Version, ReplyError> {
        #[derive(Deserialize)]
        struct VersionBody {
            etcdserver: String,
        }
        let VersionBody { etcdserver } = self.parse()?;
        Version::parse(&etcdserver)
            .ok_or_else(|| ReplyError::Malformed(format!("not a version: {}", excerpt(etcdserver.as_bytes()))))
    }
}

impl Header {
    fn check(self) -> Result<(), ReplyError> {
        if self.cluster_id == 0 || self.revision == 0 {
            return Err(ReplyError::Malformed("a header without cluster or revision".into()));
        }
        Ok(())
    }
}

fn check_key(theirs: &str, ours: &str) -> Result<(), ReplyError> {
    let theirs = BASE64.decode(theirs).map_err(|_| ReplyError::Base64("the key"))?;
    if theirs == ours.as_bytes() { Ok(()) } else { Err(ReplyError::Contradictory("an answer about another key")) }
}

/// Version of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

/// What is to be thought of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worth {
    /// No known defect that matters here.
    Good,
    /// May answer a read with an old record after the process was paused; mended in the version named.
    Stale(Version),
    /// Older than 3.4: not supported.
    TooOld,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        // Pre-releases (`3.6.0-rc.1`) and builds (`3.5.1+git`) count as what they lead to.
        let text = text.split(['-', '+']).next()?;
        let mut parts = text.split('.').map(|part| part.parse::<u32>().ok());
        let (major, minor, patch) = (parts.next()??, parts.next()??, parts.next()??);
        parts.next().is_none().then_some(Self { major, minor, patch })
    }

    /// What is to be thought of it.
    pub fn worth(self) -> Worth {
        const FIXED: [Version; 3] = [
            Version { major: 3, minor: 4, patch: 42 },
            Version { major: 3, minor: 5, patch: 28 },
            Version { major: 3, minor: 6, patch: 9 },
        ];
        if self < (Self { major: 3, minor: 4, patch: 0 }) {
            return Worth::TooOld;
        }
        let line = FIXED.iter().find(|fixed| (fixed.major, fixed.minor) == (self.major, self.minor));
        line.filter(|fixed| self < **fixed).map_or(Worth::Good, |fixed| Worth::Stale(*fixed))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// Why an answer does not fit to those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    /// Another cluster than the one that answered first, or than the configured one.
    #[error(
        "etcd cluster {found:x}, but this arbiter is cluster {ours:x}: all endpoints must belong to one cluster, and a restored one must keep its members' names, peer URLs and token"
    )]
    ForeignCluster {
        /// Ours.
        ours: u64,
        /// Theirs.
        found: u64,
    },
    /// The store is older than it was: a stale answer, or a cluster restored from a backup.
    #[error("the store is at revision {found}, but was at {seen} before: a stale answer, or restored from a backup")]
    Backwards {
        /// Highest seen.
        seen: u64,
        /// Now.
        found: u64,
    },
}

/// What one process remembers of the answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    cluster: Option<u64>,
    revision: u64,
}

impl History {
    /// Nothing was answered yet; `cluster` is the configured one, if any.
    pub fn new(cluster: Option<u64>) -> Self {
        Self { cluster, revision: 0 }
    }

    /// Takes an answer's header in.
    ///
    /// # Errors
    /// [`HistoryError`]; then nothing is remembered of it.
    pub fn admit(&mut self, header: Header) -> Result<(), HistoryError> {
        let ours = self.cluster.unwrap_or(header.cluster_id);
        if header.cluster_id != ours {
            return Err(HistoryError::ForeignCluster { ours, found: header.cluster_id });
        }
        if header.revision < self.revision {
            return Err(HistoryError::Backwards { seen: self.revision, found: header.revision });
        }
        *self = Self { cluster: Some(ours), revision: header.revision };
        Ok(())
    }

    /// Takes a lower revision as the truth from now on. Whether the *record* may be believed is the decision core's to judge.
    pub fn forget_revision(&mut self) {
        self.revision = 0;
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
