//! Quantities in `pair.toml` are strings with a unit, so that nobody confuses milliseconds with seconds.

use std::time::Duration;

/// Serde for a [`Duration`] written as `"25ms"`.
pub(super) mod span {
    use super::{Duration, format_span, parse_span};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_span(*span))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        parse_span(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// Serde for a number of bytes written as `"256MiB"`.
pub(super) mod size {
    use super::{format_size, parse_size};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
    pub(crate) fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format_size(*bytes))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        parse_size(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// The same for a duration that may be absent.
pub(super) mod maybe_span {
    use super::{Duration, format_span, parse_span};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(span: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
        match span {
            Some(span) => serializer.serialize_some(&format_span(*span)),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        text.map(|text| parse_span(&text).map_err(D::Error::custom)).transpose()
    }
}

/// The same for a size that may be absent.
pub(super) mod maybe_size {
    use super::{format_size, parse_size};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(bytes: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_some(&format_size(*bytes)),
            None => serializer.serialize_none(),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        text.map(|text| parse_size(&text).map_err(D::Error::custom)).transpose()
    }
}

const SPANS: [(&str, u64); 5] =
    [("us", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000), ("m", 60_000_000_000), ("h", 3_600_000_000_000)];
const SIZES: [(&str, u64); 4] = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];

fn parse(text: &str, units: &[(&str, u64)], what: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor = units.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    let wrong = || format!("not a {what}: {text:?} (write a whole number and a unit, like {})", example(units));
    let (Some(factor), Ok(number)) = (factor, number.parse::<u64>()) else { return Err(wrong()) };
    number.checked_mul(factor).ok_or_else(|| format!("too large: {text:?}"))
}

fn example(units: &[(&str, u64)]) -> String {
    let names: Vec<&str> = units.iter().map(|(name, _)| *name).collect();
    format!("\"25{}\"; units: {}", names[1], names.join(", "))
}

fn format(value: u64, units: &[(&str, u64)]) -> String {
    let (name, factor) = units.iter().rev().find(|(_, factor)| value.is_multiple_of(*factor)).unwrap_or(&units[0]);
    let value = if value == 0 { 0 } else { value / factor };
    let name = if value == 0 { units[0].0 } else { name };
    format!("{value}{name}")
}

/// Reads `"25ms"`; units us, ms, s, m, h.
///
/// # Errors
/// One line that says how to write it.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    parse(text, &SPANS, "duration").map(Duration::from_nanos)
}

/// Writes what [`parse_span`] reads, rounded down to microseconds.
pub fn format_span(span: Duration) -> String {
    let micros = u64::try_from(span.as_micros()).unwrap_or(u64::MAX / 1000);
    format(micros.saturating_mul(1000), &SPANS)
}

/// Reads `"256MiB"`; units B, KiB, MiB, GiB.
///
/// # Errors
/// One line that says how to write it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse(text, &SIZES, "size")
}

/// Writes what [`parse_size`] reads.
pub fn format_size(bytes: u64) -> String {
    format(bytes, &SIZES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_and_sizes_read_what_they_write() {
        for text in ["25ms", "1s", "10m", "1h", "150us", "1500ms"] {
            assert_eq!(format_span(parse_span(text).unwrap()), text);
        }
        for text in ["256MiB", "1GiB", "1536MiB", "1B", "64KiB"] {
            assert_eq!(format_size(parse_size(text).unwrap()), text);
        }
        assert_eq!(format_span(Duration::ZERO), "0us");
        assert_eq!(parse_span("60s"), parse_span("1m"));
    }

    #[test]
    fn unit_typos_signs_and_overflow_are_refused() {
        for text in
            ["25", "ms", "25 ms", "-25ms", "2.5ms", "25MS", "25msec", "", "99999999999999999999ms", "99999999999999h"]
        {
            assert!(parse_span(text).is_err(), "{text}");
        }
        for text in ["256MB", "256mib", "-1B", "1e3B", "99999999999999999GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert!(parse_span("25xs").unwrap_err().contains("units: us, ms, s, m, h"));
    }
}
