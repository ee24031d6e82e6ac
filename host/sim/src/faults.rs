//! Faults of engines, as a schedule that follows from the seed: each kind is a Poisson process over the fleet.
//!
//! A worker has one fault at a time: one that is to come when none is well does not come.

use crate::options::{self, Value};

/// How often engines fail, how, and what is done about it. Times are means in seconds; `0` between faults: there are none.
#[derive(Clone, Debug, PartialEq)]
pub struct Faults {
    /// Between two deaths in the fleet. What the engine had is lost, its cache too.
    pub die_every_s: f64,
    /// From a death until the engine is back; of just this length.
    pub down_s: f64,
    /// Between two slow spells.
    pub slow_every_s: f64,
    /// How long a spell lasts.
    pub slow_s: f64,
    /// How many times as long a step takes in it.
    pub slow_factor: f64,
    /// Between two hangs, in which an engine takes connections and does nothing.
    pub hang_every_s: f64,
    /// How long a hang lasts.
    pub hang_s: f64,
    /// How long the host waits for a token before it moves the request, and takes the worker for ill.
    pub stall_s: f64,
    /// Workers at most that are given a request, one after the other.
    pub attempts: u32,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            die_every_s: 0.0,
            down_s: 5.0,
            slow_every_s: 0.0,
            slow_s: 10.0,
            slow_factor: 4.0,
            hang_every_s: 0.0,
            hang_s: 10.0,
            stall_s: 2.0,
            attempts: 5,
        }
    }
}

impl Faults {
    /// Keys of the text form.
    pub const KEYS: &str = "die_every_s, down_s, slow_every_s, slow_s, slow_factor, hang_every_s, hang_s, stall_s, attempts";

    /// Reads `KEY=VALUE,…`.
    ///
    /// # Errors
    /// Names the key that is not known or the value that is not possible.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut faults = Self::default();
        let every = |value: Value<'_>| if value.number()? == 0.0 { Ok(0.0) } else { value.some_seconds() };
        let set = |key: &str, value: Value<'_>| {
            match key {
                "die_every_s" => faults.die_every_s = every(value)?,
                "down_s" => faults.down_s = value.seconds()?,
                "slow_every_s" => faults.slow_every_s = every(value)?,
                "slow_s" => faults.slow_s = value.seconds()?,
                "slow_factor" if !(1.0..=1e6).contains(&value.number()?) => {
                    return Err(format!("slow_factor={} is not from 1 to 1000000", value.text));
                }
                "slow_factor" => faults.slow_factor = value.number()?,
                "hang_every_s" => faults.hang_every_s = every(value)?,
                "hang_s" => faults.hang_s = value.seconds()?,
                "stall_s" => faults.stall_s = value.seconds()?,
                "attempts" => faults.attempts = value.whole(1..=1000)? as u32,
                _ => return Err(format!("{key:?} is not known; use {}", Self::KEYS)),
            }
            Ok(())
        };
        options::read(text, set)?;
        if [faults.die_every_s, faults.slow_every_s, faults.hang_every_s] == [0.0; 3] {
            return Err("no engine fails; set die_every_s, slow_every_s or hang_every_s".to_owned());
        }
        Ok(faults)
    }

    /// The mean time between two faults of a kind, in seconds; `None`: there are none.
    pub(crate) fn every(&self, kind: Fault) -> Option<f64> {
        let every = match kind {
            Fault::Die => self.die_every_s,
            Fault::Slow => self.slow_every_s,
            Fault::Hang => self.hang_every_s,
        };
        (every > 0.0).then_some(every)
    }
}

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Die,
    Slow,
    Hang,
}

impl Fault {
    pub(crate) const ALL: [Self; 3] = [Self::Die, Self::Slow, Self::Hang];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_or_not_possible_is_named() {
        let faults = Faults::parse("die_every_s=30,attempts=3").unwrap();
        assert_eq!((faults.every(Fault::Die), faults.every(Fault::Hang), faults.attempts), (Some(30.0), None, 3));
        for (text, says) in [
            ("slow_factor=0.5", "slow_factor=0.5 is not from 1"),
            ("attempts=0", "attempts=0 is not a whole number of 1 to 1000"),
            ("down_s=x", "down_s=x is not a number"),
            ("hang_every_s=1e-9", "less than a millisecond"),
            ("die_every_s=0,down_s=1", "no engine fails"),
            ("explode=1", "\"explode\" is not known; use die_every_s"),
        ] {
            let error = Faults::parse(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
