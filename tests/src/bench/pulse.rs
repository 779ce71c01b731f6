//! A word of guest memory that the running guest changes all the time: by it another thread sees that the guest runs, and that it stands.
//!
//! The demo guest under `FT.WORK 1` keeps the state of its computation in memory and changes it some hundred million times a second. Where that is depends on the
//! build, so it is looked for: among words that differ at each look, the one that differs most often.

use std::time::{Duration, Instant};

use super::BenchError;

/// Between two looks when candidates are sorted out.
const SIEVE: Duration = Duration::from_micros(300);
/// Looks at each candidate that is left, and the time between two of them.
const LOOKS: u32 = 200;
const BETWEEN: Duration = Duration::from_micros(2);
/// A pulse that beats: of a hundred looks so many find another value. The rest is when the guest looks at its network.
const BEATS: u32 = 60;
/// Candidates that are looked at one by one.
const CANDIDATES: usize = 64;
/// Looks that sort out.
const SIEVES: u32 = 4;
/// How often what is left is tried before all is looked at anew.
const TRIES: u32 = 50;
/// How long it is looked for among the same words.
const PATIENCE: Duration = Duration::from_secs(4);

/// Where the word is, in the terms of whoever reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pulse(pub u64);

impl Pulse {
    /// Finds one among the words at `places`, each of which `word` can read.
    ///
    /// # Errors
    /// None of them beats: the guest does not compute.
    pub fn find(places: &[u64], word: impl Fn(u64) -> u64) -> Result<Self, BenchError> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            let left = sieve(places, &word, began);
            for _ in 0..TRIES {
                let found = left.iter().map(|&place| (beats(place, &word), place)).max();
                if let Some((count, place)) = found
                    && count * 100 >= LOOKS * BEATS
                {
                    return Ok(Self(place));
                }
                // On a busy host the guest may have had no processor.
                std::thread::sleep(SIEVE);
            }
        }
        Err(BenchError::Wrong("no word of the guest's memory changes all the time: it does not compute".into()))
    }
}

/// Words that differ at each of some looks; a look at which none does is none: the guest had no processor.
fn sieve(places: &[u64], word: &impl Fn(u64) -> u64, began: Instant) -> Vec<u64> {
    let (mut left, mut looks) = (places.to_vec(), 0);
    while looks < SIEVES && began.elapsed() < PATIENCE {
        let before: Vec<u64> = left.iter().map(|&place| word(place)).collect();
        wait(SIEVE);
        let differs = left.iter().zip(before).filter(|(place, old)| word(**place) != *old);
        let changed: Vec<u64> = differs.map(|(place, _)| *place).collect();
        if !changed.is_empty() {
            (left, looks) = (changed, looks + 1);
        }
    }
    left.truncate(CANDIDATES);
    left
}

fn beats(place: u64, word: &impl Fn(u64) -> u64) -> u32 {
    let mut last = word(place);
    let beat = |_: &u32| {
        wait(BETWEEN);
        let now = word(place);
        std::mem::replace(&mut last, now) != now
    };
    u32::try_from((0..LOOKS).filter(beat).count()).unwrap_or(u32::MAX)
}

/// Too short to sleep.
fn wait(span: Duration) {
    let began = Instant::now();
    while began.elapsed() < span {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Words that change with each look at them, in their own way.
    fn find(places: &[u64], change: impl Fn(u64, u64) -> u64) -> Result<Pulse, BenchError> {
        let looks = Cell::new(0);
        Pulse::find(places, |place| {
            looks.set(looks.get() + 1);
            change(place, looks.get())
        })
    }

    #[test]
    fn the_word_that_changes_all_the_time_is_found() {
        // 5 at each look, 3 now and then, the others never.
        let change = |place, look| match place {
            5 => look,
            3 => look / 7,
            _ => 0,
        };
        assert_eq!(find(&[0, 1, 2, 3, 4, 5, 6, 7], change).unwrap(), Pulse(5));
    }

    #[test]
    fn a_guest_that_does_not_compute_has_none() {
        assert!(find(&[0, 1], |_, _| 7).unwrap_err().to_string().contains("does not compute"));
    }
}
