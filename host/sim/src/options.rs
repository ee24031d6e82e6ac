//! Options in the form `KEY=VALUE,…`: names, and numbers of at least 0.

use std::sync::Arc;

/// Reads each pair: `set` takes a value, or says that it knows no such key.
pub(crate) fn read(text: &str, mut set: impl FnMut(&str, Value<'_>) -> Result<(), String>) -> Result<(), String> {
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE"))?;
        set(key, Value { key, text: value })?;
    }
    Ok(())
}

/// What stands behind a key.
#[derive(Clone, Copy)]
pub(crate) struct Value<'a> {
    key: &'a str,
    pub(crate) text: &'a str,
}

impl Value<'_> {
    fn wrong(&self, is: &str) -> String {
        format!("{}={} is {is}", self.key, self.text)
    }

    /// A number of at least 0.
    pub(crate) fn number(self) -> Result<f64, String> {
        let number = self.text.replace('_', "").parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
        number.ok_or_else(|| self.wrong("not a number of at least 0"))
    }

    /// A whole number in this range.
    pub(crate) fn whole(self, range: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
        let whole = self.text.replace('_', "").parse::<u64>().ok().filter(|number| range.contains(number));
        whole.ok_or_else(|| self.wrong(&format!("not a whole number of {} to {}", range.start(), range.end())))
    }

    /// A time in seconds, up to a year.
    pub(crate) fn seconds(self) -> Result<f64, String> {
        self.number()?;
        Some(self.number()?).filter(|seconds| *seconds <= 31_536_000.0).ok_or_else(|| self.wrong("more than a year of seconds"))
    }

    /// A time in seconds that is more than nothing: so many events in a moment would never end.
    pub(crate) fn some_seconds(self) -> Result<f64, String> {
        Some(self.seconds()?).filter(|seconds| *seconds >= 0.001).ok_or_else(|| self.wrong("less than a millisecond (0.001)"))
    }

    /// A priority, which may be negative.
    pub(crate) fn priority(self) -> Result<f32, String> {
        let priority = self.text.parse::<f32>().ok().filter(|priority| (-1e9..=1e9).contains(priority));
        priority.ok_or_else(|| self.wrong("not a number from -1000000000 to 1000000000"))
    }

    /// The name of a class.
    pub(crate) fn class(self) -> Result<Arc<str>, String> {
        let wrong = || self.wrong("no class: use letters, digits, '.', '_' and '-', at most 64 of them");
        dynamo_host_core::admission::is_class(self.text).then(|| self.text.into()).ok_or_else(wrong)
    }

    /// A weight of a class or tenant.
    pub(crate) fn weight(self) -> Result<f32, String> {
        let weight = self.number()? as f32;
        let range = dynamo_host_core::admission::WEIGHTS;
        let wrong = || self.wrong(&format!("no weight from {} to {}", range.start(), range.end()));
        dynamo_host_core::admission::is_weight(weight).then_some(weight).ok_or_else(wrong)
    }
}
