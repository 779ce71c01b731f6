//! What must be equal on both hosts for a guest of one to run on the other: named values, opaque to this crate.

use std::collections::BTreeMap;

use crate::limits::{MAX_FACT_NAME_BYTES, MAX_FACT_VALUE_BYTES, MAX_FACTS};

/// A fact cannot be stated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FactError {
    /// The name is empty, too long, or has other characters than `a-z`, `0-9`, `.`, `_` and `-`.
    #[error("not a name of a fact (1 to {MAX_FACT_NAME_BYTES} characters out of a-z, 0-9, '.', '_' and '-')")]
    BadName,
    /// The value is too long or has control characters.
    #[error("a fact's value is over {MAX_FACT_VALUE_BYTES} bytes or has control characters")]
    BadValue,
    /// The name was stated before.
    #[error("a fact is stated twice")]
    Duplicate,
    /// Over [`MAX_FACTS`].
    #[error("over {MAX_FACTS} facts")]
    TooMany,
}

/// Facts by name. Names that start with `approx.` have whole numbers that may differ by [`Facts::APPROX_PPM`]; names that start with
/// `info.` are for people and never compared; all others must be equal on both sides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts(BTreeMap<String, String>);

impl Facts {
    /// Prefix of names whose values may differ a little (a clock's frequency as the host measured it).
    pub const APPROX: &str = "approx.";
    /// By how much, in millionths of the larger value.
    pub const APPROX_PPM: u128 = 250;
    /// Prefix of names that are never compared.
    pub const INFO: &str = "info.";

    /// No facts.
    pub fn new() -> Self {
        Self::default()
    }

    /// States one more fact.
    ///
    /// # Errors
    /// [`FactError`] says what is wrong with it; nothing was added.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) -> Result<(), FactError> {
        let (name, value) = (name.into(), value.into());
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        if name.is_empty() || name.len() > MAX_FACT_NAME_BYTES || !name.bytes().all(allowed) {
            return Err(FactError::BadName);
        }
        if value.len() > MAX_FACT_VALUE_BYTES || value.chars().any(char::is_control) {
            return Err(FactError::BadValue);
        }
        if self.0.contains_key(&name) {
            return Err(FactError::Duplicate);
        }
        if self.0.len() == MAX_FACTS {
            return Err(FactError::TooMany);
        }
        self.0.insert(name, value);
        Ok(())
    }

    /// The value of `name`.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// All facts, sorted by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_facts_are_stated_and_each_once() {
        let mut facts = Facts::new();
        assert_eq!(facts.insert("cpuid.digest", "ab12"), Ok(()));
        assert_eq!(facts.insert("cpuid.digest", "ab12"), Err(FactError::Duplicate));
        for name in ["", "A", "a b", "ä", &"a".repeat(MAX_FACT_NAME_BYTES + 1)] {
            assert_eq!(facts.insert(name, ""), Err(FactError::BadName), "{name:?}");
        }
        assert_eq!(facts.insert("x", "\x1b[2J"), Err(FactError::BadValue));
        assert_eq!(facts.insert("x", "v".repeat(MAX_FACT_VALUE_BYTES + 1)), Err(FactError::BadValue));
        assert_eq!(facts.iter().collect::<Vec<_>>(), [("cpuid.digest", "ab12")]);
        for n in facts.len()..MAX_FACTS {
            assert_eq!(facts.insert(format!("n{n}"), ""), Ok(()));
        }
        assert_eq!(facts.insert("one-more", ""), Err(FactError::TooMany));
    }
}
