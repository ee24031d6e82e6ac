//! Generation as all doubles do it: paced if it is long, so that there is something to cancel.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::time::timeout;

use super::{AtWork, Left, Manners, shapes::Whole};
use crate::scripted::{Connection, STREAM_HEAD, http_chunk, whole_answer};

/// Requests of more tokens than this take their time.
const QUICK_TOKENS: u64 = 64;
const TOKEN_TIME: Duration = Duration::from_millis(1);

/// One request's place in the count of running ones.
struct Work<'a, M: Manners> {
    at_work: &'a AtWork,
    manners: &'a M,
    id: String,
    left: Option<Instant>,
}

impl<'a, M: Manners> Work<'a, M> {
    fn begin(at_work: &'a AtWork, manners: &'a M, body: &Value) -> Self {
        at_work.running.fetch_add(1, Ordering::SeqCst);
        manners.worked(at_work);
        Self { at_work, manners, id: body["rid"].as_str().unwrap_or_default().to_owned(), left: None }
    }

    /// Makes a token; whether there is anybody to make another one for.
    async fn token(&mut self, connection: &mut Connection, quick: bool, stream: bool) -> bool {
        self.at_work.tokens.fetch_add(1, Ordering::SeqCst);
        if quick {
            return true;
        }
        if self.left.is_some() {
            tokio::time::sleep(TOKEN_TIME).await;
        } else if timeout(TOKEN_TIME, connection.hung_up()).await.is_ok() {
            self.left = Some(Instant::now());
        }
        // As SGLang's scheduler matches.
        let aborted = self.at_work.aborted.lock().unwrap().iter().any(|id| !id.is_empty() && self.id.starts_with(id.as_str()));
        let notices = self.left.is_none_or(|left| match self.manners.client_left(stream) {
            Left::Stops => false,
            Left::RunsOn => true,
            Left::NoticedLate => left.elapsed() < Duration::from_secs(2),
        });
        notices && !aborted
    }
}

impl<M: Manners> Drop for Work<'_, M> {
    fn drop(&mut self) {
        self.at_work.running.fetch_sub(1, Ordering::SeqCst);
        self.manners.worked(self.at_work);
    }
}

/// Answers; whether the connection serves another request.
pub(super) async fn answer<M: Manners>(
    connection: &mut Connection,
    manners: &M,
    at_work: &AtWork,
    chat: bool,
    body: &Value,
) -> bool {
    let prompt = if chat { &body["messages"] } else { &body["prompt"] };
    let tokens = body["max_tokens"].as_u64().unwrap_or(16);
    let (quick, stream) = (tokens <= QUICK_TOKENS, body["stream"] == true);
    let words: Vec<String> = (0..tokens).map(|at| word(prompt, at)).collect();
    let whole = Whole { chat, prompt_tokens: prompt_tokens(prompt), words: &words };
    let mut work = Work::begin(at_work, manners, body);
    if !stream {
        for _ in &words {
            if !work.token(connection, quick, false).await {
                return false;
            }
        }
        drop(work);
        connection.write(whole_answer("200 OK", &manners.shapes().whole(&whole))).await;
        return true;
    }
    connection.write(STREAM_HEAD).await;
    let events = manners.shapes().events(&whole, body["stream_options"]["include_usage"] == true);
    for event in &events {
        connection.write(http_chunk(&format!("data: {event}\n\n"))).await;
        if !work.token(connection, quick, true).await {
            return false;
        }
    }
    drop(work);
    let done = if manners.says_done() { http_chunk("data: [DONE]\n\n") } else { String::new() };
    connection.write(format!("{done}0\r\n\r\n")).await;
    !manners.closes_after_streams()
}

fn word(prompt: &Value, at: u64) -> String {
    let mut hasher = DefaultHasher::new();
    (prompt.to_string(), at).hash(&mut hasher);
    format!(" w{:03}", hasher.finish() % 1000)
}

fn prompt_tokens(prompt: &Value) -> u64 {
    match prompt {
        Value::Array(ids) if ids.iter().all(Value::is_number) => ids.len() as u64,
        other => other.to_string().split_whitespace().count() as u64 + 1,
    }
}
