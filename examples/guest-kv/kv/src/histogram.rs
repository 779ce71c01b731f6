//! Latencies, counted in buckets whose width is a 32nd of their value.

use alloc::boxed::Box;
use alloc::vec;

const BITS: u32 = 5;
const WIDTH: usize = 1 << BITS;
const BUCKETS: usize = WIDTH * (65 - BITS as usize);

/// A distribution.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    max: u64,
}

fn index(value: u64) -> usize {
    let shift = (u64::BITS - BITS - 1).saturating_sub(value.leading_zeros());
    let part = usize::try_from(value >> shift).unwrap_or(0);
    usize::try_from(shift).unwrap_or(0) * WIDTH + part
}

/// The largest value in a bucket.
fn upper(index: usize) -> u64 {
    let shift = (index / WIDTH).saturating_sub(1);
    let part = (index - shift * WIDTH) as u64;
    part.checked_add(1).and_then(|next| next.checked_mul(1 << shift)).map_or(u64::MAX, |next| next - 1)
}

impl Histogram {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { buckets: vec![0; BUCKETS].into_boxed_slice(), count: 0, max: 0 }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        if let Some(bucket) = self.buckets.get_mut(index(value)) {
            *bucket += 1;
        }
        self.count += 1;
        self.max = self.max.max(value);
    }

    /// Values so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The largest value; 0 if there is none.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `percent` of all values do not exceed, to about 3 % above; 0 if there is none.
    #[must_use]
    pub fn percentile(&self, percent: u64) -> u64 {
        let rank = (u128::from(self.count) * u128::from(percent.min(100))).div_ceil(100).max(1);
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return upper(index).min(self.max);
            }
        }
        self.max
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_bucket_that_is_close() {
        let powers = (0..64).flat_map(|bit| [(1u64 << bit) - 1, 1 << bit, (1 << bit) + (1 << bit) / 3]);
        for value in powers.chain(0..5000).chain([u64::MAX]) {
            let index = index(value);
            assert!(index < BUCKETS, "{value}");
            let upper = upper(index);
            assert!(value <= upper && upper - value <= value / 32, "{value}: {upper}");
        }
    }

    #[test]
    fn percentiles() {
        let mut histogram = Histogram::new();
        assert_eq!((histogram.percentile(50), histogram.max()), (0, 0));
        (1..=1000).for_each(|value| histogram.record(value));
        for (percent, exact) in [(50, 500), (99, 990), (100, 1000), (0, 1)] {
            let value = histogram.percentile(percent);
            assert!((exact..=exact + exact / 31).contains(&value), "{percent}: {value}");
        }
        assert_eq!((histogram.max(), histogram.count()), (1000, 1000));
    }
}
