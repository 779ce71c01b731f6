//! The check of one key's history, and the shortest history that shows what is wrong.

use std::collections::BTreeMap;
use std::fmt;

use todc_utils::linearizability::WGLChecker;
use todc_utils::linearizability::history::{Action, History};
use todc_utils::specifications::Specification;

use super::{Answer, Operation, Outcome, Request, Value};

/// One key, as the checker wants it specified.
struct OneKey;

#[derive(Clone, Debug)]
struct Step {
    request: Request,
    /// `None`: any answer fits, since nobody saw it.
    answer: Option<Answer>,
}

impl Specification for OneKey {
    type State = Value;
    type Operation = Step;

    fn init() -> Value {
        Value::Absent
    }

    fn apply(step: &Step, state: &Value) -> (bool, Value) {
        let (answer, next) = step.request.apply(state);
        let fits = next != Value::Broken && step.answer.as_ref().is_none_or(|seen| *seen == answer);
        if fits { (true, next) } else { (false, state.clone()) }
    }
}

/// A history that no single guest without failures could have produced.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The key.
    pub key: String,
    /// The shortest beginning of its history that shows it, in the order of calls.
    pub operations: Vec<Operation>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "key {} is not linearizable; called, answered (microseconds), operation:", self.key)?;
        self.operations.iter().try_for_each(|operation| writeln!(f, "{operation}"))
    }
}

/// Whether the history of one key, which nothing held before, is linearizable.
#[must_use]
pub fn check_key(operations: &[Operation]) -> bool {
    // Equal times count as concurrent: calls sort before answers. What was never answered may take effect at any later time, or never, which is
    // the same as after everything else.
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * operations.len());
    for (id, operation) in operations.iter().enumerate() {
        events.push((operation.called_us, false, id));
        let end = match operation.outcome {
            Outcome::Answered { at_us, .. } => at_us,
            Outcome::Unknown => u64::MAX,
        };
        events.push((end, true, id));
    }
    events.sort_unstable();
    let action = |(_, is_answer, id): (u64, bool, usize)| {
        let Operation { request, outcome, .. } = &operations[id];
        let answer = match outcome {
            Outcome::Answered { answer, .. } => Some(answer.clone()),
            Outcome::Unknown => None,
        };
        let step = Step { request: request.clone(), answer };
        // Each operation is a process of its own: the order within a client follows from the times.
        (id, if is_answer { Action::Response(step) } else { Action::Call(step) })
    };
    let actions: Vec<_> = events.into_iter().map(action).collect();
    actions.is_empty() || WGLChecker::<OneKey>::is_linearizable(History::from_actions(actions))
}

/// Checks each key; what is wrong is cut down to the shortest beginning that is wrong.
#[must_use]
pub fn violations(keys: &BTreeMap<String, Vec<Operation>>) -> Vec<Violation> {
    let wrong = keys.iter().filter(|(_, operations)| !check_key(operations));
    wrong.map(|(key, operations)| Violation { key: key.clone(), operations: shortest(operations) }).collect()
}

/// The shortest beginning of a history that is not linearizable. Every beginning of a linearizable history is linearizable, so
/// the length can be searched by halves.
fn shortest(operations: &[Operation]) -> Vec<Operation> {
    let mut ends: Vec<u64> = operations
        .iter()
        .filter_map(|operation| match operation.outcome {
            Outcome::Answered { at_us, .. } => Some(at_us),
            Outcome::Unknown => None,
        })
        .collect();
    ends.sort_unstable();
    let first_bad = ends.partition_point(|&until| check_key(&beginning(operations, until)));
    let mut shown = match ends.get(first_bad) {
        Some(&until) => beginning(operations, until),
        None => operations.to_vec(),
    };
    shown.sort_by_key(|operation| operation.called_us);
    shown
}

/// What had been called by a time, with the answers that had come by then.
fn beginning(operations: &[Operation], until_us: u64) -> Vec<Operation> {
    let called = operations.iter().filter(|operation| operation.called_us <= until_us).cloned();
    called
        .map(|mut operation| {
            if matches!(operation.outcome, Outcome::Answered { at_us, .. } if at_us > until_us) {
                operation.outcome = Outcome::Unknown;
            }
            operation
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::rng::Rng;

    fn op(called_us: u64, at_us: u64, request: Request, answer: Answer) -> Operation {
        let outcome = Outcome::Answered { at_us, answer };
        Operation { client: 0, key: "k".into(), request, called_us, outcome }
    }

    fn lost(called_us: u64, request: Request) -> Operation {
        Operation { client: 1, key: "k".into(), request, called_us, outcome: Outcome::Unknown }
    }

    fn text(word: &str) -> Answer {
        Answer::Text(word.into())
    }

    fn set(word: &str) -> Request {
        Request::Set(word.into())
    }

    #[test]
    fn concurrent_operations_may_take_effect_in_any_order() {
        let both = [op(0, 10, set("a"), Answer::Ok), op(1, 9, set("b"), Answer::Ok)];
        for seen in ["a", "b"] {
            assert!(check_key(&[&both[..], &[op(11, 12, Request::Get, text(seen))]].concat()), "{seen}");
        }
        // Whoever touches at one and the same time is concurrent.
        assert!(check_key(&[op(0, 5, set("a"), Answer::Ok), op(5, 6, Request::Get, Answer::Nothing)]));
        assert!(check_key(&[]));
    }

    #[test]
    fn a_stale_read_is_caught() {
        let history =
            [op(0, 1, set("a"), Answer::Ok), op(2, 3, set("b"), Answer::Ok), op(4, 5, Request::Get, text("a"))];
        assert!(!check_key(&history));
        // Also when it is stale only against another read.
        let history = [
            op(0, 1, set("a"), Answer::Ok),
            op(2, 20, set("b"), Answer::Ok),
            op(4, 5, Request::Get, text("b")),
            op(6, 7, Request::Get, text("a")),
        ];
        assert!(!check_key(&history));
    }

    #[test]
    fn a_lost_write_is_caught() {
        assert!(!check_key(&[op(0, 1, set("a"), Answer::Ok), op(2, 3, Request::Get, Answer::Nothing)]));
        let push = |word: &str| Request::Push(word.into());
        let history = [
            op(0, 1, push("x"), Answer::Number(1)),
            op(2, 3, push("y"), Answer::Number(2)),
            op(4, 5, Request::Range, Answer::Items(vec!["y".into()])),
        ];
        assert!(!check_key(&history));
    }

    #[test]
    fn a_duplicated_apply_is_caught() {
        let twice = [op(0, 1, Request::Increment, Answer::Number(1)), op(2, 3, Request::Increment, Answer::Number(3))];
        assert!(!check_key(&twice));
        let append = Request::Append("ab".into());
        let twice = [op(0, 1, append, Answer::Number(2)), op(2, 3, Request::Get, text("abab"))];
        assert!(!check_key(&twice));
        // A write that was acknowledged and overwritten comes back.
        let again = [
            op(0, 1, set("a"), Answer::Ok),
            op(2, 3, set("b"), Answer::Ok),
            op(4, 5, Request::Get, text("b")),
            op(6, 7, Request::Get, text("a")),
        ];
        assert!(!check_key(&again));
        // Two clients are both told that theirs was the first.
        let first = |word: &str| Request::SetNew(word.into());
        assert!(!check_key(&[op(0, 9, first("a"), Answer::Ok), op(1, 8, first("b"), Answer::Ok)]));
    }

    #[test]
    fn what_is_unknown_happens_late_or_never_but_once() {
        let unknown = lost(0, Request::Increment);
        for seen in [1, 2] {
            assert!(check_key(&[unknown.clone(), op(5, 6, Request::Increment, Answer::Number(seen))]), "{seen}");
        }
        assert!(!check_key(&[unknown.clone(), op(5, 6, Request::Increment, Answer::Number(3))]));
        // Late: after a read that did not see it.
        let late = [unknown, op(5, 6, Request::Get, Answer::Nothing), op(7, 8, Request::Get, text("1"))];
        assert!(check_key(&late));
        // Not before it was asked for.
        assert!(!check_key(&[op(0, 1, Request::Get, text("a")), lost(2, set("a"))]));
    }

    #[test]
    fn a_violation_is_cut_down_and_named() {
        let mut history = vec![op(0, 1, set("a"), Answer::Ok), op(2, 3, Request::Get, text("z"))];
        history.extend((0..50).map(|n| op(10 + 2 * n, 11 + 2 * n, set("b"), Answer::Ok)));
        let found = violations(&super::super::by_key(history));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].operations.len(), 2);
        assert!(found[0].to_string().contains("Get k -> Text(\"z\")"), "{}", found[0]);
    }

    /// Tries every order.
    fn brute_force(operations: &[Operation], done: u32, state: &Value) -> bool {
        let left = |id: &usize| done & (1 << id) == 0;
        let answered = |id: usize| match operations[id].outcome {
            Outcome::Answered { at_us, .. } => at_us,
            Outcome::Unknown => u64::MAX,
        };
        let mut ids = 0..operations.len();
        if ids.clone().filter(left).all(|id| answered(id) == u64::MAX) {
            return true;
        }
        let first_answer = ids.clone().filter(left).map(answered).min().unwrap_or(u64::MAX);
        ids.any(|id| {
            let Operation { request, called_us, outcome, .. } = &operations[id];
            if !left(&id) || *called_us > first_answer {
                return false;
            }
            let (answer, next) = request.apply(state);
            let fits = match outcome {
                Outcome::Answered { answer: seen, .. } => *seen == answer,
                Outcome::Unknown => true,
            };
            next != Value::Broken && fits && brute_force(operations, done | 1 << id, &next)
        })
    }

    /// Random small histories, most of them made by a guest that lies now and then.
    fn random_history(rng: &mut Rng) -> Vec<Operation> {
        let mut state = Value::Absent;
        let mut at = 10;
        (0..rng.range(1, 7))
            .map(|n| {
                at += rng.range(0, 4);
                let word = format!("v{n}").into();
                let request = match rng.range(0, 5) {
                    0 => Request::Get,
                    1 => Request::Set(word),
                    2 => Request::SetNew(word),
                    3 => Request::Delete,
                    _ => Request::Append(word),
                };
                let (answer, next) = request.apply(&state);
                if rng.range(0, 3) != 0 {
                    state = next;
                }
                let (called_us, at_us) = (at - rng.range(0, 5), at + rng.range(0, 5));
                match rng.range(0, 8) {
                    0 => lost(called_us, request),
                    _ => op(called_us, at_us, request, answer),
                }
            })
            .collect()
    }

    #[test]
    fn the_search_agrees_with_trying_all_orders() {
        let mut rng = Rng::new(7);
        let mut counts = [0_u32; 2];
        for round in 0..20_000 {
            let history = random_history(&mut rng);
            let expected = brute_force(&history, 0, &Value::Absent);
            assert_eq!(check_key(&history), expected, "round {round}: {history:#?}");
            counts[usize::from(expected)] += 1;
        }
        assert!(counts.iter().all(|&count| count > 1_000), "both verdicts occur: {counts:?}");
    }

    /// Six clients, 600 operations on one key: a search that did not remember where it has been would not end.
    #[test]
    fn a_long_concurrent_history_is_checked_in_time() {
        let mut state = Value::Absent;
        let history: Vec<Operation> = (0..600_u64)
            .map(|n| {
                let request = if n % 3 == 0 { Request::Get } else { Request::Set(format!("v{n}").into()) };
                let (answer, next) = request.apply(&state);
                state = next;
                op(10 * n, 10 * n + 59, request, answer)
            })
            .collect();
        let began = std::time::Instant::now();
        assert!(check_key(&history));
        let mut wrong = history;
        wrong.push(op(7_000, 7_001, Request::Get, text("v1")));
        assert!(!check_key(&wrong));
        assert!(began.elapsed() < std::time::Duration::from_secs(60), "{:?}", began.elapsed());
    }
}
