//! A whole run: round after round, on one pair after another.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::checker::Checker;
use super::load::{self, CLIENTS, Known, PATIENCE, reading};
use super::plan::{Fault, Kind};
use super::report::{LONG_US, Report, Round};
use super::stage::{Settled, Stage};
use crate::history::{Answer, Operation, Outcome, Request};
use crate::real::artifacts::Artifacts;
use crate::real::rng::{Rng, mix};
use crate::real::{Error, MachineKind, Result, clock};

/// Rounds after which all values of the pair so far are read again, and their keys deleted.
const AUDIT_ROUNDS: u64 = 20;
/// Longest time that keys are used: their histories must stay short.
const ERA: Duration = Duration::from_secs(2);
/// Failures after which a run ends early.
const FAILURES_MAX: usize = 5;
/// How long the histories that are left at the end may take to be checked.
const CHECK_LIMIT: Duration = Duration::from_secs(120);
/// Reads of the auditor that are under way at once.
const WINDOW: usize = 32;
const POLL: Duration = Duration::from_millis(5);

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// KVM or model.
    pub machine: MachineKind,
    /// What is in the pairs' `[epoch]`, in the words of [`crate::real::pair::PairOptions::epoch`].
    pub epoch: String,
    /// What everything is drawn from.
    pub seed: u64,
    /// Number of the first round.
    pub first: u64,
    /// Number of rounds.
    pub faults: u64,
    /// Longest time that a fault lasts.
    pub longest: Duration,
    /// Only faults of this kind.
    pub kind: Option<Kind>,
    /// Only double faults, or none; a quarter when not given.
    pub double: Option<bool>,
    /// Where the pairs' directories are made.
    pub files: Option<PathBuf>,
    /// A time after which no further round is begun.
    pub until: Option<Instant>,
}

/// Runs; `progress` is told of each round, and of failures.
pub fn run(artifacts: &Artifacts, options: &Options, mut progress: impl FnMut(&Round, &Report)) -> Result<Report> {
    let began = Instant::now();
    let mut runner = Runner {
        artifacts,
        options,
        report: Report::new(options.machine, options.seed, options.faults),
        checker: Checker::start()?,
        era: 1,
        round: options.first,
        values: BTreeMap::new(),
        violations_seen: 0,
    };
    let mut stage: Option<Stage> = None;
    for number in options.first..options.first + options.faults {
        let late = options.until.is_some_and(|until| Instant::now() >= until);
        if late || runner.report.failures.len() >= FAILURES_MAX {
            break;
        }
        runner.round = number;
        match runner.round(&mut stage) {
            Ok(round) => {
                progress(&round, &runner.report);
                runner.report.rounds.push(round);
            }
            Err(e) => runner.fail(stage.take(), &e.to_string()),
        }
        runner.look_at_checker(&mut stage);
    }
    if let Some(mut ended) = stage.take() {
        if let Err(e) = runner.audit(&mut ended) {
            runner.fail(Some(ended), &e.to_string());
        } else {
            runner.strike(&mut ended);
        }
    }
    let Runner { checker, mut report, .. } = runner;
    let checked = checker.finish(CHECK_LIMIT)?;
    report.count(&checked);
    report.sum_up();
    report.took_seconds = began.elapsed().as_secs();
    Ok(report)
}

struct Runner<'a> {
    artifacts: &'a Artifacts,
    options: &'a Options,
    report: Report,
    checker: Checker,
    /// Number of the next era or quiet time.
    era: u64,
    round: u64,
    /// Keys that nobody writes to any more, with what they held when they were last read.
    values: BTreeMap<String, Answer>,
    violations_seen: usize,
}

impl Runner<'_> {
    /// Sets a pair up where there is none.
    fn set_stage(&mut self, slot: &mut Option<Stage>, rng: &mut Rng) -> Result<()> {
        if slot.is_none() {
            self.values.clear();
            self.era += 1;
            let (machine, files) = ((self.options.machine, &*self.options.epoch), self.options.files.clone());
            *slot = Some(Stage::set(self.artifacts, machine, files, rng.next_u64(), self.era)?);
            self.report.pairs += 1;
        }
        Ok(())
    }

    fn round(&mut self, slot: &mut Option<Stage>) -> Result<Round> {
        let mut rng = Rng::new(mix(self.options.seed ^ mix(self.round)));
        self.set_stage(slot, &mut rng)?;
        let stage = slot.as_mut().expect("set above");
        let quiet = rng.range(0, 4) == 0;
        self.dirty(stage, &mut rng)?;
        if quiet {
            self.hush(stage)?;
        }
        let was = stage.owner;
        let fault = Fault::draw(&mut rng, was, self.options.longest, self.options.kind, self.options.double);
        wait(rng.duration(Duration::from_millis(30), Duration::from_millis(400)));
        self.ready(stage)?;
        stage.begin_round();
        let began_us = clock::mono_us();
        let settled = self.play(stage, &fault).and_then(|()| {
            stage.mend_all()?;
            stage.settle()
        });
        let healed_us = clock::mono_us();
        let mut round = Round {
            number: self.round,
            fault: fault.word(),
            second_after_ms: fault.second.map(|(_, after)| millis(after)),
            quiet,
            lasted_ms: fault.timeline.last().map_or(0, |(at, _)| millis(*at)),
            gap_us: 0,
            client_gap_us: 0,
            healed_ms: (healed_us - began_us) / 1_000,
            moved: false,
            outage: None,
            trace: Vec::new(),
        };
        let settled = settled.map_err(|e| Error::answer(format!("{round:?}"), e.to_string()))?;
        match settled {
            Settled::Protected(owner) => {
                stage.owner = owner;
                round.moved = owner != was;
                self.turn(stage, quiet, healed_us)?;
            }
            Settled::Outage(row) => {
                let excused = fault.second.is_some() || self.was_alone_before(stage, began_us)?;
                if !excused {
                    return Err(Error::answer(format!("{round:?}"), format!("one fault, and an outage: {row:?}")));
                }
                round.outage = Some(row);
                *self.report.outages.entry(row).or_default() += 1;
            }
        }
        self.judge(stage, &mut round, began_us)?;
        if round.outage.is_some()
            && let Some(mut ended) = slot.take()
        {
            self.strike(&mut ended);
        } else if (self.round + 1).is_multiple_of(AUDIT_ROUNDS)
            && let Some(stage) = slot
        {
            self.audit(stage)?;
        }
        Ok(round)
    }

    /// Gives the guest some memory to dirty beside its work.
    fn dirty(&mut self, stage: &mut Stage, rng: &mut Rng) -> Result<()> {
        let rate = ["0", "200", "2000"][usize::try_from(rng.range(0, 3)).unwrap_or(0)];
        let words: &[&str] = if rate == "0" { &["FT.DIRTY", "0"] } else { &["FT.DIRTY", rate, "512"] };
        ask(stage, words).map(drop)
    }

    /// Makes the clients only read, with every answer known.
    fn hush(&mut self, stage: &mut Stage) -> Result<()> {
        let values: Vec<(String, Answer)> = self
            .values
            .iter()
            .filter(|(key, _)| reading(key) == Request::Get)
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        self.era += 1;
        stage.load.quiet(self.era, Known { digest: None, values: values.clone() });
        self.wait_turned(stage)?;
        let digest = match ask(stage, &["FT.DIGEST"])? {
            Answer::Text(digest) => Some(digest),
            other => return Err(Error::answer("FT.DIGEST", format!("{other:?}"))),
        };
        self.era += 1;
        stage.load.quiet(self.era, Known { digest, values });
        self.wait_turned(stage)
    }

    /// Nothing is begun before the pair is protected: a busy host may just have lost its backup.
    fn ready(&mut self, stage: &mut Stage) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !stage.is_protected() {
            match stage.settle()? {
                Settled::Protected(owner) => stage.owner = owner,
                Settled::Outage(row) => return Err(Error::answer("a pair without a fault", format!("{row:?}"))),
            }
            if Instant::now() >= deadline {
                let detail = stage.pair.logs();
                return Err(Error::Timeout {
                    what: "a protected moment".into(),
                    waited: Duration::from_secs(60),
                    detail,
                });
            }
        }
        Ok(())
    }

    /// Carries out the timeline.
    fn play(&mut self, stage: &mut Stage, fault: &Fault) -> Result<()> {
        let began = Instant::now();
        let mut era_ends = began + ERA;
        for (at, act) in &fault.timeline {
            while began.elapsed() < *at {
                let now = Instant::now();
                if now >= era_ends {
                    self.next_era(stage);
                    era_ends = now + ERA;
                }
                wait((began + *at).min(era_ends).saturating_duration_since(now));
            }
            stage.act(*act)?;
        }
        Ok(())
    }

    /// New keys, unless this is a quiet time.
    fn next_era(&mut self, stage: &Stage) {
        if stage.load.is_writing() {
            self.era += 1;
            stage.load.write(self.era);
        }
    }

    /// Waits until every client has had an answer after `since_us`, then lets them write to new keys, and checks what is complete.
    fn turn(&mut self, stage: &mut Stage, quiet: bool, since_us: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while stage.load.oldest_answer_us() <= since_us {
            self.check_clients(stage, deadline)?;
        }
        if quiet {
            // Nobody may still ask for a digest when others begin to write.
            self.era += 1;
            stage.load.quiet(self.era, Known::default());
            self.wait_turned(stage)?;
        }
        self.era += 1;
        stage.load.write(self.era);
        self.wait_turned(stage)?;
        if quiet {
            return Ok(());
        }
        let present = format!("e{}:", self.era);
        let (open, mut ended): (Vec<_>, Vec<_>) =
            stage.load.take_operations().into_iter().partition(|operation| operation.key.starts_with(&present));
        open.into_iter().for_each(|operation| stage.load.record(operation));
        let keys: std::collections::BTreeSet<String> = ended.iter().map(|operation| operation.key.clone()).collect();
        let last = self.read_all(stage, keys.into_iter().collect())?;
        for operation in &last {
            if let Outcome::Answered { answer, .. } = &operation.outcome {
                self.values.insert(operation.key.clone(), answer.clone());
            }
        }
        ended.extend(last);
        self.checker.check(self.round, ended);
        Ok(())
    }

    fn wait_turned(&mut self, stage: &mut Stage) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !stage.load.has_turned() {
            self.check_clients(stage, deadline)?;
        }
        Ok(())
    }

    fn check_clients(&self, stage: &mut Stage, deadline: Instant) -> Result<()> {
        if stage.load.lost() > 0 || Instant::now() >= deadline {
            let detail = format!("{:?}\n{}", stage.load.take_complaints(), stage.pair.logs());
            return Err(Error::Timeout { what: "an answer to every client".into(), waited: PATIENCE, detail });
        }
        wait(POLL);
        Ok(())
    }

    /// Reads keys over the auditor's connection; each read is an operation like those of the clients.
    fn read_all(&mut self, stage: &mut Stage, keys: Vec<String>) -> Result<Vec<Operation>> {
        let mut operations = Vec::new();
        for keys in keys.chunks(WINDOW) {
            let mut asked = Vec::new();
            for key in keys {
                let request = reading(key);
                let called_us = clock::mono_us();
                stage.auditor.send(&request.words(key)).map_err(Error::io("the auditor's connection"))?;
                asked.push((key.clone(), request, called_us));
            }
            for (key, request, called_us) in asked {
                let reply = stage.auditor.receive().map_err(Error::io("the auditor's connection"))?;
                let answer = Answer::try_from(reply).map_err(|what| Error::answer(&key, what))?;
                let outcome = Outcome::Answered { at_us: clock::mono_us(), answer };
                operations.push(Operation { client: CLIENTS, key, request, called_us, outcome });
            }
        }
        Ok(operations)
    }

    /// All that was ever left behind on this pair is still there; then it makes room.
    fn audit(&mut self, stage: &mut Stage) -> Result<()> {
        let values = std::mem::take(&mut self.values);
        let found = self.read_all(stage, values.keys().cloned().collect())?;
        for operation in &found {
            let Outcome::Answered { answer, .. } = &operation.outcome else { continue };
            let expected = values.get(&operation.key);
            if expected != Some(answer) {
                let what = format!("{} is {answer:?}, and was {expected:?} when it was last read", operation.key);
                return Err(Error::answer("a value was lost later", what));
            }
        }
        self.report.values_read_again += found.len() as u64;
        for key in values.keys() {
            ask(stage, &["DEL", key])?;
        }
        Ok(())
    }

    /// Whether the owner had left protection before it was killed: by itself on a busy host, or because its cables were dead first.
    fn was_alone_before(&self, stage: &mut Stage, began_us: u64) -> Result<bool> {
        let before = began_us.saturating_sub(2_000_000)..stage.killed_us.unwrap_or(began_us);
        let logs = stage.poll()?;
        let left =
            |e: &crate::real::events::Event| before.contains(&e.mono_us) && e.from.as_deref() == Some("protected");
        Ok(logs.into_iter().flatten().any(left))
    }

    /// Everything that can be said about a round once it is over.
    fn judge(&mut self, stage: &mut Stage, round: &mut Round, began_us: u64) -> Result<()> {
        let answers = stage.load.take_answers();
        (round.gap_us, round.client_gap_us) = load::gaps(&answers, began_us);
        let seen = stage.witness.take();
        stage.poll()?;
        let mut wrong = stage.look(&seen.turns);
        wrong.extend(seen.contradictions);
        wrong.extend(stage.load.take_complaints());
        self.report.repeated_bytes += seen.repeated_bytes;
        if round.gap_us > LONG_US || !wrong.is_empty() {
            round.trace = stage.trace(began_us, &seen.turns);
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::answer(format!("{round:?}"), wrong.join("\n"))) }
    }

    /// What a pair leaves behind when it is taken down in order.
    fn strike(&mut self, stage: &mut Stage) {
        self.report.generations.push(stage.rights.generation());
        self.report.resumed += stage.resumed;
        self.report.guest_digests_compared += stage.load.digests();
        self.report.late_turns += stage.rights.late_turns;
        self.report.latest_ms = self.report.latest_ms.max(millis(stage.rights.latest));
        let (activations, compared) = stage.activations();
        self.report.activations += activations;
        self.report.ram_compared += compared;
        // What clients wait for now has an unknown outcome, and no key is read for the last time any more.
        stage.load.stop();
        self.checker.check(self.round, stage.load.take_operations());
    }

    /// Something was not as it must be: its pair is kept as it is, and taken down.
    fn fail(&mut self, stage: Option<Stage>, what: &str) {
        let mut text = format!("round {} (--seed {} --first {}): {what}", self.round, self.options.seed, self.round);
        if let Some(mut stage) = stage {
            self.report.connections_lost += stage.load.lost();
            stage.pair.keep_files();
            let dir = stage.pair.dir().display().to_string();
            text = format!("{text}\nfiles: {dir}\n{}", stage.pair.logs());
            self.report.kept.push(dir);
            self.strike(&mut stage);
        }
        eprintln!("{text}");
        self.report.failures.push(text);
    }

    /// A history that turned out to be wrong ends the life of its pair, with the files kept.
    fn look_at_checker(&mut self, slot: &mut Option<Stage>) {
        let violations = self.checker.so_far().violations;
        if violations.len() > self.violations_seen {
            for (round, what) in &violations[self.violations_seen..] {
                eprintln!("round {round} (--seed {}): {what}", self.options.seed);
            }
            self.violations_seen = violations.len();
            if let Some(mut stage) = slot.take() {
                stage.pair.keep_files();
                self.report.kept.push(stage.pair.dir().display().to_string());
                self.strike(&mut stage);
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn wait(time: Duration) {
    thread::sleep(time);
}

/// Asks the guest over the auditor's connection.
fn ask(stage: &mut Stage, words: &[&str]) -> Result<Answer> {
    let reply = stage.auditor.call(words).map_err(Error::io("the auditor's connection"))?;
    Answer::try_from(reply).map_err(|what| Error::answer(words.join(" "), what))
}
