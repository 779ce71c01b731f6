//! What `ftctl status` says.

use serde_json::Value;

use super::{Error, Result};

/// A status document, `ft.status/1`.
#[derive(Clone, Debug)]
pub struct Status(Value);

/// Three points of a distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Points {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Status {
    /// Reads the output of `ftctl status --output json`.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(text).map_err(|e| Error::answer("ftctl status", format!("{e} in: {text}")))?;
        match value["schema"].as_str() {
            Some("ft.status/1") => Ok(Self(value)),
            other => Err(Error::answer("ftctl status", format!("schema is {other:?}, not ft.status/1"))),
        }
    }

    /// The state word, in lower case; empty when the document has none.
    #[must_use]
    pub fn state(&self) -> String {
        self.0["state"].as_str().unwrap_or_default().to_lowercase()
    }

    /// A number of the document.
    #[must_use]
    pub fn number(&self, field: &str) -> Option<u64> {
        self.0[field].as_u64()
    }

    /// A flag of the document.
    #[must_use]
    pub fn flag(&self, field: &str) -> Option<bool> {
        self.0[field].as_bool()
    }

    /// One of the document's `timings`, for example `pause`, in units of `unit_seconds` (0.001 for milliseconds). `None` when there
    /// is no such timing, or nothing was measured yet.
    #[must_use]
    pub fn timing(&self, name: &str, unit_seconds: f64) -> Option<Points> {
        let timing = &self.0["timings"][name];
        let part = |field: &str| timing[field].as_f64().map(|seconds| seconds / unit_seconds);
        if timing["count"].as_u64()? == 0 {
            return None;
        }
        Some(Points { p50: part("p50_seconds")?, p99: part("p99_seconds")?, max: part("max_seconds")? })
    }

    /// The whole document.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timings_in_their_unit() {
        let text = r#"{"schema":"ft.status/1","state":"protected","timings":{
            "pause":{"count":2,"p50_seconds":0.001,"p99_seconds":0.002,"max_seconds":0.004},"ack":{"count":0}}}"#;
        let status = Status::parse(text).unwrap();
        assert_eq!(status.timing("pause", 1e-3), Some(Points { p50: 1.0, p99: 2.0, max: 4.0 }));
        assert_eq!((status.timing("ack", 1.0), status.timing("other", 1.0)), (None, None));
        assert!(Status::parse(r#"{"schema":"ft.status/2"}"#).is_err() && Status::parse("").is_err());
    }
}
