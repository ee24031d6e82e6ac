//! Reader of Prometheus' text format, as far as engines write it.
//!
//! Contract: samples in order, names and labels as they are written, nothing allocated; comments are skipped. It is
//! strict: the first line that is not of the format is an error, so that a page of something else is never taken for
//! measurements. Any bytes are safe to read.
//! Format: <https://prometheus.io/docs/instrumenting/exposition_formats/>

use std::borrow::Cow;

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Sample<'a> {
    /// The metric's name.
    pub(crate) name: &'a str,
    /// What stands between the braces.
    labels: &'a str,
    /// The value.
    pub(crate) value: f64,
}

/// A line that is not of the format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {number} is not of Prometheus' text format: {text}")]
pub(crate) struct Malformed {
    number: usize,
    text: String,
}

/// The samples of a text. Nothing comes after an error.
pub(crate) fn samples(text: &[u8]) -> impl Iterator<Item = Result<Sample<'_>, Malformed>> {
    let mut failed = false;
    let lines = text.split(|&byte| byte == b'\n').enumerate();
    lines.filter_map(|(at, line)| sample(at + 1, line).transpose()).take_while(move |item| {
        let after_an_error = failed;
        failed = item.is_err();
        !after_an_error
    })
}

fn sample(number: usize, line: &[u8]) -> Result<Option<Sample<'_>>, Malformed> {
    const MAX_CHARS: usize = 80;
    let malformed = || Malformed { number, text: String::from_utf8_lossy(line).chars().take(MAX_CHARS).collect() };
    let text = str::from_utf8(line).map_err(|_| malformed())?.trim_matches(|char| matches!(char, ' ' | '\t' | '\r'));
    if text.is_empty() || text.starts_with('#') {
        return Ok(None);
    }
    read(text).map(Some).ok_or_else(malformed)
}

/// `name{label="value",…} value [timestamp]`
fn read(text: &str) -> Option<Sample<'_>> {
    let end = text.find(|char: char| !(char.is_ascii_alphanumeric() || matches!(char, '_' | ':'))).filter(|&end| end > 0)?;
    let (name, rest) = text.split_at(end);
    let (labels, rest) = match rest.trim_start().strip_prefix('{') {
        Some(inner) => inner.split_at(labels_end(inner)?),
        None => ("", rest),
    };
    let rest = rest.strip_prefix('}').unwrap_or(rest);
    let mut words = rest.split_ascii_whitespace();
    let value = words.next()?.parse().ok()?;
    let timestamp = words.next().is_none_or(|word| word.parse::<i64>().is_ok());
    (timestamp && words.next().is_none()).then_some(Sample { name, labels, value })
}

/// Where the closing brace is, if all before it is labels.
fn labels_end(inner: &str) -> Option<usize> {
    let mut rest = inner;
    loop {
        rest = rest.trim_start_matches([' ', ',']);
        if rest.starts_with('}') {
            return Some(inner.len() - rest.len());
        }
        rest = label(rest)?.2;
    }
}

/// The first label's name, its value as written, and what follows.
fn label(text: &str) -> Option<(&str, &str, &str)> {
    let (name, rest) = text.split_once('=')?;
    let rest = rest.trim_start().strip_prefix('"')?;
    let mut escaped = false;
    let end = rest.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    let name = name.trim();
    (!name.is_empty() && !name.contains(['"', '}'])).then_some((name, &rest[..end], &rest[end + 1..]))
}

impl<'a> Sample<'a> {
    /// A label's value.
    pub(crate) fn label(&self, wanted: &str) -> Option<Cow<'a, str>> {
        let mut rest = self.labels;
        loop {
            let (name, value, after) = label(rest.trim_start_matches([' ', ',']))?;
            if name == wanted {
                return Some(unescaped(value));
            }
            rest = after;
        }
    }

    /// The value as a count; nothing if it is negative or not a number.
    pub(crate) fn count(&self) -> Option<u32> {
        (self.value >= 0.0).then_some(self.value as u32)
    }
}

fn unescaped(value: &str) -> Cow<'_, str> {
    if !value.contains('\\') {
        return value.into();
    }
    let mut plain = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(char) = chars.next() {
        plain.push(match char {
            '\\' => match chars.next() {
                Some('n') => '\n',
                Some(other) => other,
                None => '\\',
            },
            other => other,
        });
    }
    plain.into()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn read_all(text: &str) -> Vec<Result<Sample<'_>, Malformed>> {
        samples(text.as_bytes()).collect()
    }

    #[track_caller]
    fn only(text: &str) -> Sample<'_> {
        let mut all = read_all(text);
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0).unwrap()
    }

    #[test]
    fn names_labels_and_values_are_read() {
        let sample = only("# HELP a b\n# TYPE a gauge\r\n vllm:a{engine=\"0\",model_name=\"m}, x\"} 1.5e3 1700000000\n\n");
        assert_eq!((sample.name, sample.value, sample.count()), ("vllm:a", 1500.0, Some(1500)));
        assert_eq!(sample.label("engine").unwrap(), "0");
        assert_eq!(sample.label("model_name").unwrap(), "m}, x");
        assert_eq!(sample.label("other"), None);
        assert_eq!(only("a 1").label("engine"), None);
        assert_eq!(only("a{} 1").value, 1.0);
        assert_eq!(only("a{b=\"c\",} 1").label("b").unwrap(), "c");
        assert_eq!(only(r#"a{b="x\"y\\",c="z\nw"} 1"#).label("b").unwrap(), r#"x"y\"#);
        assert_eq!(only(r#"a{b="x\"y\\",c="z\nw"} 1"#).label("c").unwrap(), "z\nw");
    }

    #[test]
    fn what_counts_nothing_is_no_count() {
        assert_eq!(only("a NaN").count(), None);
        assert_eq!(only("a -1").count(), None);
        assert_eq!(only("a +Inf").count(), Some(u32::MAX));
    }

    #[test]
    fn what_is_not_of_the_format_is_an_error_and_the_end() {
        for line in
            ["<html>", "{\"error\":1}", "a", "a{b=\"c} 1", "a{b} 1", "a{b=\"c\"", "a one", "a 1 2 3", "{b=\"c\"} 1", "a 1 x"]
        {
            let text = format!("first 1\n{line}\nlast 1\n");
            let all = read_all(&text);
            assert_eq!(all.len(), 2, "{line}: {all:?}");
            assert_eq!(all[1].as_ref().unwrap_err().number, 2, "{line}");
        }
        assert!(samples(b"a \xff\n").next().unwrap().is_err());
    }

    #[test]
    fn what_real_engines_write_is_read_to_the_end() {
        for (text, last) in [
            (include_str!("../tests/fixtures/vllm_metrics.txt"), "vllm:cache_config_info"),
            (include_str!("../tests/fixtures/llama_metrics.txt"), "llamacpp:requests_deferred"),
        ] {
            let all: Result<Vec<_>, _> = samples(text.as_bytes()).collect();
            assert!(all.unwrap().iter().any(|sample| sample.name == last), "{last}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_safe(bytes in vec(any::<u8>(), 0..200), text in "[a{}\"=\\\\, 1\n]{0,60}") {
            for sample in samples(&bytes).chain(samples(text.as_bytes())).flatten() {
                let _ = (sample.label("a"), sample.count());
            }
        }

        #[test]
        fn what_is_written_is_read(name in "[a-z:_]{1,9}", value in "[^\"\\\\\n\r]{0,20}", number in any::<u32>()) {
            let text = format!("{name}{{x=\"1\",y=\"{value}\"}} {number}\n");
            let sample = samples(text.as_bytes()).next().unwrap().unwrap();
            prop_assert_eq!(sample.name, &name);
            prop_assert_eq!(sample.label("y").unwrap(), value);
            prop_assert_eq!(sample.count(), Some(number));
        }
    }
}
