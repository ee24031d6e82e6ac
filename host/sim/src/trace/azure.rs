//! Azure's traces (2023, 2024): CSV with a time, the prompt's tokens and the output's. They say nothing of prefixes, so
//! every prompt is unlike all others.

use std::time::Duration;

use super::{Broken, TraceRequest};
use crate::prompt::Segment;

pub(super) const EXPECTED: &str = "TIMESTAMP,ContextTokens,GeneratedTokens with YYYY-MM-DD HH:MM:SS.FRACTION,TOKENS,TOKENS below";

pub(super) fn is_header(line: &str) -> bool {
    line.trim().eq_ignore_ascii_case("TIMESTAMP,ContextTokens,GeneratedTokens")
}

pub(super) fn read(text: &str) -> Result<Vec<TraceRequest>, (usize, Broken)> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()).skip(1);
    (0..).zip(lines).map(|(nth, (number, line))| request(nth, line).map_err(|broken| (number, broken))).collect()
}

fn request(nth: u32, line: &str) -> Result<TraceRequest, Broken> {
    let fields: Vec<&str> = line.trim().split(',').collect();
    let [time, context, generated] = fields[..] else {
        return Err(format!("{} fields instead of 3", fields.len()));
    };
    let count = |name: &str, text: &str| {
        text.trim().parse::<u32>().ok().ok_or_else(|| format!("{name} is {text:?}, not a whole number of tokens"))
    };
    let at = moment(time).ok_or_else(|| format!("the time is {time:?}"))?;
    let (tokens, output_tokens) = (count("ContextTokens", context)?.max(1), count("GeneratedTokens", generated)?.max(1));
    Ok(TraceRequest { at, prompt: [Segment { stream: nth, tokens }].into(), output_tokens, session: None })
}

/// Time since 1970-01-01 of `YYYY-MM-DD HH:MM:SS[.FRACTION]`; a zone after it is not looked at, since all lines have the same.
fn moment(text: &str) -> Option<Duration> {
    let (date, time) = text.trim().split_once([' ', 'T'])?;
    let time = time.split(['+', 'Z']).next()?;
    let mut date = date.split('-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':');
    let (hours, minutes): (u64, u64) = (time.next()?.parse().ok()?, time.next()?.parse().ok()?);
    let (seconds, fraction) = time.next().map(|seconds| seconds.split_once('.').unwrap_or((seconds, "0")))?;
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let is_one = (1..=12).contains(&month) && (1..=31).contains(&day) && hours < 24 && minutes < 60;
    let days = u64::try_from(days_since_1970(year, month, day)).ok().filter(|_| is_one)?;
    Some(Duration::new(days * 86_400 + hours * 3600 + minutes * 60 + seconds.parse::<u64>().ok().filter(|s| *s <= 60)?, nanos))
}

/// Days of the civil calendar (Howard Hinnant's `days_from_civil`).
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}
