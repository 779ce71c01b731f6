//! One HTTP request, bounded in time and size, which knows whether it may have been heard.

use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ureq::config::Config;
use ureq::tls::TlsConfig;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, DefaultConnector, Either, NextTimeout, Transport,
};
use ureq::{Agent, Body, http};

use super::wire::{Call, HttpReply, MAX_REPLY_BYTES};

/// Longest head of a reply, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// No reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NoReply {
    /// Whether a byte of the request may have left. If not, nobody can ever act on it.
    pub(super) sent: bool,
    /// What happened.
    pub(super) text: String,
}

/// An HTTP client that follows nobody, asks no proxy, keeps no cookies, and tries nothing twice.
#[derive(Debug)]
pub(super) struct Http {
    agent: Agent,
    sent: Arc<AtomicBool>,
}

impl Http {
    /// `timeout` bounds a request as a whole, from the name's resolution to the last byte of the reply; `connect` bounds what comes before the
    /// request, the TLS handshake included.
    pub(super) fn new(timeout: Duration, connect: Duration, tls: TlsConfig) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .timeout_resolve(Some(connect))
            .timeout_connect(Some(connect))
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .proxy(None)
            .user_agent(concat!("ft/", env!("CARGO_PKG_VERSION")))
            .accept("application/json")
            .max_response_header_size(MAX_HEAD)
            .max_idle_connections_per_host(1)
            .tls_config(tls)
            .build();
        let sent = Arc::new(AtomicBool::new(false));
        let connector = DefaultConnector::new().chain(Noticing { sent: Arc::clone(&sent) });
        Self { agent: Agent::with_parts(config, connector, Addresses::default()), sent }
    }

    /// Carries out a request against `endpoint` (`http://host:port`).
    pub(super) fn call(&self, endpoint: &str, call: &Call, token: Option<&str>) -> Result<HttpReply, NoReply> {
        self.sent.store(false, Ordering::Release);
        let reply = self.ask(endpoint, call, token).and_then(read_reply);
        reply.map_err(|error| NoReply { sent: self.sent.load(Ordering::Acquire), text: plain(&error) })
    }

    fn ask(&self, endpoint: &str, call: &Call, token: Option<&str>) -> Result<http::Response<Body>, ureq::Error> {
        let url = format!("{endpoint}{}", call.path);
        let Some(body) = &call.body else {
            return self.agent.get(url).call();
        };
        let request = self.agent.post(url).content_type("application/json");
        let request = match token {
            Some(token) => request.header(http::header::AUTHORIZATION, token),
            None => request,
        };
        request.send(body.as_str())
    }
}

fn read_reply(mut response: http::Response<Body>) -> Result<HttpReply, ureq::Error> {
    let encoding = response.headers().get(http::header::CONTENT_ENCODING);
    let encoding = encoding.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let limit = u64::try_from(MAX_REPLY_BYTES).expect("a small constant") + 1;
    let mut body = Vec::new();
    response.body_mut().as_reader().take(limit).read_to_end(&mut body)?;
    Ok(HttpReply { status: response.status().as_u16(), encoding, body })
}

/// An error on one line, without anything that a terminal would act on.
fn plain(error: &ureq::Error) -> String {
    error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}

/// Looks up names, and nothing else: an address is what it says. The library asks a thread of its own in either case, so that on a busy host a request to an
/// address would wait for that thread to be scheduled, and fail when it is not in time.
#[derive(Debug, Default)]
struct Addresses {
    names: DefaultResolver,
}

impl Resolver for Addresses {
    fn resolve(
        &self,
        uri: &http::Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let written = uri.scheme().zip(uri.authority()).and_then(|(s, a)| DefaultResolver::host_and_port(s, a));
        let Some(address) = written.and_then(|written| written.parse::<SocketAddr>().ok()) else {
            return self.names.resolve(uri, config, timeout);
        };
        let mut resolved = self.empty();
        resolved.push(address);
        Ok(resolved)
    }
}

/// The last link of the connector's chain: whatever passes it is part of a request.
#[derive(Debug)]
struct Noticing {
    sent: Arc<AtomicBool>,
}

impl<In: Transport> Connector<In> for Noticing {
    type Out = Either<In, NoticingTransport>;

    fn connect(&self, _: &ConnectionDetails<'_>, chained: Option<In>) -> Result<Option<Self::Out>, ureq::Error> {
        let wrap = |inner: In| Either::B(NoticingTransport { inner: inner.boxed(), sent: Arc::clone(&self.sent) });
        Ok(chained.map(wrap))
    }
}

#[derive(Debug)]
struct NoticingTransport {
    inner: Box<dyn Transport>,
    sent: Arc<AtomicBool>,
}

impl Transport for NoticingTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.inner.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        // Before the first byte, not after the last: a part of it may arrive.
        self.sent.store(true, Ordering::Release);
        self.inner.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        self.inner.await_input(timeout)
    }

    fn is_open(&mut self) -> bool {
        self.inner.is_open()
    }

    fn is_tls(&self) -> bool {
        self.inner.is_tls()
    }
}
