//! The arbiter across hosts: the record in a plain key of etcd, never under a lease.
//!
//! A compare-and-swap is one transaction that compares the key's `mod_revision`; a read is linearizable. Endpoints are asked in order, beginning
//! with the one that answered last. A read that fails goes to the next one. A compare-and-swap goes to the next one only if not a byte of it
//! has left, or if etcd said that it did not carry it out; otherwise its outcome is unknown, and the decision core finds out.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use replication_proto::VmId;

use super::{Arbiter, ArbiterError, CasOutcome, Record, Revision, Versioned};
use crate::config::EtcdSection;

mod http;
mod secrets;
pub mod wire;

use http::{Http, NoReply};
use wire::{Call, Found, Header, History, HistoryError, HttpReply, ReplyError, Swapped, Version, Worth};

/// Why one endpoint did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Trouble {
    /// No reply.
    #[error("{0}")]
    NoReply(String, bool),
    /// A reply that is no answer.
    #[error("{0}")]
    Reply(#[from] ReplyError),
    /// An answer that does not fit to those before.
    #[error("{0}")]
    History(#[from] HistoryError),
    /// A server that is too old.
    #[error("etcd {0} is older than 3.4")]
    TooOld(Version),
    /// The password's file.
    #[error("{0}")]
    Password(String),
    /// What had to come first did not work, so that this was not asked at all.
    #[error("not asked: {0}")]
    NotAsked(Box<Trouble>),
}

impl From<NoReply> for Trouble {
    fn from(no: NoReply) -> Self {
        Self::NoReply(no.text, no.sent)
    }
}

impl Trouble {
    /// Whether what was asked was certainly not done and never will be.
    fn certainly_not_done(&self) -> bool {
        match self {
            Self::NoReply(_, sent) => !sent,
            Self::Reply(error) => error.certainly_not_done(),
            Self::TooOld(_) | Self::Password(_) | Self::NotAsked(_) => true,
            Self::History(_) => false,
        }
    }

    fn needs_a_person(&self) -> bool {
        match self {
            Self::NoReply(..) => false,
            Self::Reply(error) => error.needs_a_person(),
            Self::History(_) | Self::TooOld(_) | Self::Password(_) => true,
            Self::NotAsked(inner) => inner.needs_a_person(),
        }
    }
}

#[derive(Debug)]
struct Endpoint {
    url: String,
    /// It has answered a read in this life of the process, as a member of our cluster.
    verified: bool,
    /// What it said of itself; not asked yet, or not understood, when `None`.
    version: Option<Version>,
}

struct Login {
    user: String,
    password_file: PathBuf,
    token: Option<String>,
}

/// Without the token: it opens the same door as the password.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { user, password_file, token } = self;
        let token = if token.is_some() { "some token" } else { "no token" };
        write!(f, "Login {{ {user:?}, {}, {token} }}", password_file.display())
    }
}

/// What is known of the servers, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct EtcdFacts {
    /// The endpoint that is asked first.
    pub endpoint: String,
    /// The record's key.
    pub key: String,
    /// The server's version, once it has answered.
    pub server: Option<String>,
    /// What should be done about it, if anything.
    pub advice: Option<String>,
    /// Duration of the last request that was answered.
    pub latency: Option<Duration>,
}

/// An arbiter in etcd.
#[derive(Debug)]
pub struct EtcdArbiter {
    key: String,
    endpoints: Vec<Endpoint>,
    /// Whom to ask first.
    current: usize,
    http: Http,
    login: Option<Login>,
    history: History,
    latency: Option<Duration>,
}

impl EtcdArbiter {
    /// Uses the record of `vm` in the cluster that `section` describes. Nothing is asked yet.
    ///
    /// # Errors
    /// [`ArbiterError::Unusable`] when a certificate, key or password file cannot be used.
    pub fn open(section: &EtcdSection, vm: VmId) -> Result<Self, ArbiterError> {
        let unusable = |error: secrets::SecretError| ArbiterError::Unusable(error.to_string());
        let tls = secrets::tls(section).map_err(unusable)?;
        let login = match (&section.user, &section.password_file) {
            (Some(user), Some(password_file)) => {
                // Read again for each token, so that it may be changed; a wrong file is said at once.
                secrets::password(password_file).map_err(unusable)?;
                Some(Login { user: user.clone(), password_file: password_file.clone(), token: None })
            }
            _ => None,
        };
        let endpoint = |url: &String| Endpoint { url: url.clone(), verified: false, version: None };
        Ok(Self {
            key: format!("{}{vm}/record", section.prefix),
            endpoints: section.endpoints.iter().map(endpoint).collect(),
            current: 0,
            http: Http::new(section.timeout, section.connect_timeout, tls),
            login,
            history: History::new(section.cluster()),
            latency: None,
        })
    }

    /// What is known of the servers.
    pub fn facts(&self) -> EtcdFacts {
        let endpoint = &self.endpoints[self.current];
        EtcdFacts {
            endpoint: endpoint.url.clone(),
            key: self.key.clone(),
            server: endpoint.version.map(|version| version.to_string()),
            advice: endpoint.version.and_then(advice),
            latency: self.latency,
        }
    }

    /// The endpoints' places in the order in which they are asked.
    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (count, first) = (self.endpoints.len(), self.current);
        (0..count).map(move |step| (first + step) % count)
    }

    fn call(&self, at: usize, call: &Call, token: Option<&str>) -> Result<HttpReply, Trouble> {
        Ok(self.http.call(&self.endpoints[at].url, call, token)?)
    }

    /// Asks one endpoint, with a token where one is needed. `read` turns the reply into the answer.
    fn ask<T>(
        &mut self,
        at: usize,
        call: &Call,
        read: impl Fn(&HttpReply) -> Result<T, ReplyError>,
    ) -> Result<T, Trouble> {
        self.log_in(at)?;
        let token = self.login.as_ref().and_then(|login| login.token.clone());
        let started = Instant::now();
        let answer = read(&self.call(at, call, token.as_deref())?);
        let answer = match answer {
            // It was certainly not carried out, so it may be asked again, even if it is a compare-and-swap.
            Err(error) if error.wants_new_token() && self.login.is_some() => {
                self.forget_token();
                self.log_in(at)?;
                let token = self.login.as_ref().and_then(|login| login.token.clone());
                read(&self.call(at, call, token.as_deref())?)
            }
            answer => answer,
        };
        if answer.is_ok() {
            self.latency = Some(started.elapsed());
        }
        if answer.as_ref().is_err_and(ReplyError::wants_new_token) {
            self.forget_token();
        }
        Ok(answer?)
    }

    fn forget_token(&mut self) {
        if let Some(login) = &mut self.login {
            login.token = None;
        }
    }

    /// Gets a token, if one is needed and there is none.
    fn log_in(&mut self, at: usize) -> Result<(), Trouble> {
        let Some(Login { user, password_file, token: None }) = &self.login else { return Ok(()) };
        let password = secrets::password(password_file).map_err(|error| Trouble::Password(error.to_string()))?;
        let call = Call::authenticate(user, &password);
        let reply = self.call(at, &call, None).map_err(|trouble| Trouble::NotAsked(Box::new(trouble)))?;
        match reply.token() {
            Ok(token) => {
                if let Some(login) = &mut self.login {
                    login.token = Some(token);
                }
                Ok(())
            }
            Err(error) if error.knows_no_users() => {
                log::warn!("{}: etcd knows no users: asked without a token", self.endpoints[at].url);
                Ok(())
            }
            Err(error) => Err(Trouble::NotAsked(Box::new(error.into()))),
        }
    }

    fn read_at(&mut self, at: usize) -> Result<Found, Trouble> {
        let key = self.key.clone();
        let call = Call::range(&key);
        let mut found = self.ask(at, &call, |reply| reply.found(&key))?;
        if let Err(HistoryError::Backwards { .. }) = self.history.admit(found.header) {
            // A stale answer is gone at the second look. One that stays was restored from a backup.
            found = self.ask(at, &call, |reply| reply.found(&key))?;
        }
        match self.history.admit(found.header) {
            Err(backwards @ HistoryError::Backwards { .. }) => {
                log::error!("{}: {backwards}", self.endpoints[at].url);
                self.history.forget_revision();
                self.history.admit(found.header)?;
            }
            admitted => admitted?,
        }
        self.verify(at)?;
        Ok(found)
    }

    /// Asks a server that has just proved to be a member of our cluster for its version, once.
    fn verify(&mut self, at: usize) -> Result<(), Trouble> {
        let url = &self.endpoints[at].url;
        if self.endpoints[at].verified {
            return Ok(());
        }
        match self.call(at, &Call::version(), None).and_then(|reply| Ok(reply.version()?)) {
            Ok(version) if version.worth() == Worth::TooOld => return Err(Trouble::TooOld(version)),
            Ok(version) => {
                if let Some(advice) = advice(version) {
                    log::warn!("{url}: etcd {version}: {advice}");
                }
                self.endpoints[at].version = Some(version);
            }
            // Not worth an outage: it has answered what matters.
            Err(trouble) => log::warn!("{url}: does not say its version: {trouble}"),
        }
        self.endpoints[at].verified = true;
        Ok(())
    }

    fn swap_at(&mut self, at: usize, call: &Call, expected: Option<Revision>) -> Result<Swapped, Trouble> {
        if !self.endpoints[at].verified {
            // A swap in a foreign cluster could not be taken back.
            self.read_at(at).map_err(|trouble| Trouble::NotAsked(Box::new(trouble)))?;
        }
        let key = self.key.clone();
        let swapped = self.ask(at, call, |reply| reply.swapped(&key, expected))?;
        self.admit_swap(swapped.header)?;
        Ok(swapped)
    }

    /// The outcome of a swap in our cluster is what it is, even in a store that was restored; the decision core judges the revision.
    fn admit_swap(&mut self, header: Header) -> Result<(), HistoryError> {
        match self.history.admit(header) {
            Err(HistoryError::Backwards { .. }) => {
                self.history.forget_revision();
                self.history.admit(header)
            }
            admitted => admitted,
        }
    }
}

/// What should be done about a server of this version.
fn advice(version: Version) -> Option<String> {
    match version.worth() {
        Worth::Good => None,
        Worth::Stale(fixed) => Some(format!("may answer with an old record after a pause, upgrade it to {fixed}")),
        Worth::TooOld => Some("too old, upgrade it".into()),
    }
}

impl Arbiter for EtcdArbiter {
    fn read(&mut self) -> Result<Option<Versioned>, ArbiterError> {
        let mut troubles = Vec::new();
        for at in self.order() {
            match self.read_at(at) {
                Ok(found) => {
                    self.current = at;
                    return Ok(found.record);
                }
                Err(trouble) => troubles.push((at, trouble)),
            }
        }
        let text = self.told(&troubles);
        let hopeless = troubles.iter().any(|(_, trouble)| trouble.needs_a_person());
        Err(if hopeless { ArbiterError::Unusable(text) } else { ArbiterError::Unreachable(text) })
    }

    fn compare_and_swap(&mut self, expected: Option<Revision>, record: &Record) -> CasOutcome {
        record.validate().expect("we write only records that we would read");
        let Some(call) = Call::swap(&self.key, expected, record) else {
            return CasOutcome::Conflict;
        };
        let mut troubles = Vec::new();
        for at in self.order() {
            match self.swap_at(at, &call, expected) {
                Ok(Swapped { header: _, applied }) => {
                    self.current = at;
                    return applied.map_or(CasOutcome::Conflict, CasOutcome::Applied);
                }
                Err(trouble) if trouble.certainly_not_done() => troubles.push((at, trouble)),
                Err(trouble) => {
                    // Whoever is asked next should not be the one who has just failed to answer.
                    self.current = (at + 1) % self.endpoints.len();
                    troubles.push((at, trouble));
                    return CasOutcome::Unknown(self.told(&troubles));
                }
            }
        }
        CasOutcome::Failed(self.told(&troubles))
    }

    fn describe(&self) -> String {
        let EtcdFacts { endpoint, key, server, advice, latency: _ } = self.facts();
        let others = match self.endpoints.len() - 1 {
            0 => String::new(),
            others => format!(" (+{others})"),
        };
        let server = server.map_or(String::new(), |version| format!(", version {version}"));
        let advice = advice.map_or(String::new(), |advice| format!(": {advice}"));
        format!("etcd {endpoint}{others} {key}{server}{advice}")
    }
}

impl EtcdArbiter {
    fn told(&self, troubles: &[(usize, Trouble)]) -> String {
        let lines: Vec<String> =
            troubles.iter().map(|(at, trouble)| format!("{}: {trouble}", self.endpoints[*at].url)).collect();
        lines.join("; ")
    }
}

#[cfg(test)]
mod tests;
