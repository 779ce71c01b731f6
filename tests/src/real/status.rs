//! What `ftctl status` says.

use serde_json::Value;

use super::{Error, Result};

/// A status document, `ft.status/1`.
#[derive(Clone, Debug)]
pub struct Status(Value);

/// Three points of a distribution, in the unit of the field they came from.
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

    /// A distribution of the document.
    #[must_use]
    pub fn points(&self, field: &str) -> Option<Points> {
        let part = |name: &str| self.0[field][name].as_f64();
        Some(Points { p50: part("p50")?, p99: part("p99")?, max: part("max")? })
    }

    /// The whole document.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0
    }
}
