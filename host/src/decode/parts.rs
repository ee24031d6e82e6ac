//! A body taken apart: one body for each choice of each prompt, as they would be asked for alone.
//!
//! Contract: parts come in the order of the choices that they are, prompt by prompt; but for `n`, `best_of`, `prompt` and `seed` they are what the
//! client wrote. A `seed` is counted up from choice to choice, as vLLM does it (`seed + index`), and begins anew with each prompt: with one seed
//! for all, the choices of a prompt would be equal. What makes choices depend on each other is refused.

use bytes::Bytes;
use serde_json::value::RawValue;

use super::fields::Fields;
use crate::error::RequestError;

/// A body taken apart.
#[derive(Debug)]
pub(crate) struct Parts {
    /// Choices of each prompt.
    pub(crate) choices: usize,
    /// In the order of the whole answer's choices.
    pub(crate) bodies: Vec<Bytes>,
}

/// Takes a decoded body of several choices apart. `prompts` and `choices` are those of its facts, `max` is how many parts there may be, `max_bytes`
/// their size altogether.
///
/// # Errors
/// What of it cannot be taken apart.
pub(crate) fn parts(body: &Bytes, prompts: u32, choices: u32, max: u64, max_bytes: usize) -> Result<Parts, RequestError> {
    let refused =
        |field, found: String, expected: &str| RequestError::InvalidField { field, found, expected: expected.to_owned() };
    let text = std::str::from_utf8(body).unwrap_or_default();
    // It was decoded before, so that it is one.
    let fields: Fields<'_> =
        serde_json::from_str(text).map_err(|error| RequestError::InvalidJson { reason: error.to_string() })?;
    let field = if prompts > 1 { "prompt" } else { "n" };
    if u64::from(choices) > max {
        let found = format!("such that {choices} choices are asked for altogether");
        return Err(refused(field, found, &format!("ask for at most {max} in one request")));
    }
    let n = choices / prompts.max(1);
    if fields.get("best_of").is_some_and(|best_of| best_of.get() != n.to_string()) {
        let expected = "leave it out: each choice is made for itself here, and none is compared with others";
        return Err(refused("best_of", "another number than `n`".to_owned(), expected));
    }
    if fields.get("use_beam_search").is_some_and(|value| value.get() != "false") {
        let expected = "leave it out: each choice is made for itself here";
        return Err(refused("use_beam_search", "set".to_owned(), expected));
    }
    let prompts: Vec<Option<&RawValue>> = match fields.get("prompt").filter(|_| prompts > 1) {
        Some(batch) => serde_json::from_str::<Vec<&RawValue>>(batch.get()).unwrap_or_default().into_iter().map(Some).collect(),
        None => vec![None],
    };
    // Another kind of value is the engine's to refuse.
    let seed: Option<i64> = fields.get("seed").and_then(|seed| seed.get().parse().ok());
    let (mut bodies, mut bytes) = (Vec::<Bytes>::with_capacity(choices as usize), 0usize);
    for prompt in prompts {
        for choice in 0..n {
            let body = match (bodies.last(), seed) {
                // Those of one prompt are the same.
                (Some(same), None) if choice > 0 => same.clone(),
                _ => part(&fields, prompt, seed.map(|seed| seed.wrapping_add(choice.into()))),
            };
            bytes = bytes.saturating_add(body.len());
            if bytes > max_bytes {
                let found =
                    format!("too many for a body of {} bytes, which is sent once for each choice of each prompt", text.len());
                return Err(refused(field, found, "send several requests, or have the operator raise limits.max_body_bytes"));
            }
            bodies.push(body);
        }
    }
    Ok(Parts { choices: n as usize, bodies })
}

fn part(fields: &Fields<'_>, prompt: Option<&RawValue>, seed: Option<i64>) -> Bytes {
    let seed = seed.map(|seed| seed.to_string());
    let mut values = vec![("n", "1"), ("best_of", "1")];
    values.extend(prompt.map(|prompt| ("prompt", prompt.get())));
    values.extend(seed.as_deref().map(|seed| ("seed", seed)));
    fields.with(&values).into()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const ALL: (u64, usize) = (128, 1 << 20);

    fn of(body: &Value, prompts: u32, choices: u32, (max, max_bytes): (u64, usize)) -> Result<Vec<Value>, String> {
        let parts = parts(&body.to_string().into(), prompts, choices, max, max_bytes).map_err(|error| error.to_string())?;
        assert_eq!(parts.choices as u32, choices / prompts);
        Ok(parts.bodies.iter().map(|body| serde_json::from_slice(body).unwrap()).collect())
    }

    #[test]
    fn parts_have_one_choice_of_one_prompt_each_in_the_order_of_the_answer() {
        let body = json!({ "model": "m", "prompt": ["a", "b"], "n": 2, "best_of": 2, "seed": 7, "stop": ["x"] });
        let one = |prompt: &str, seed: i32| json!({ "model": "m", "prompt": prompt, "n": 1, "best_of": 1, "seed": seed, "stop": ["x"] });
        assert_eq!(of(&body, 2, 4, ALL).unwrap(), [one("a", 7), one("a", 8), one("b", 7), one("b", 8)]);
        let ids = json!({ "prompt": [[1, 2], [3]] });
        assert_eq!(of(&ids, 2, 2, ALL).unwrap(), [json!({ "prompt": [1, 2] }), json!({ "prompt": [3] })]);
    }

    #[test]
    fn choices_of_a_chat_are_its_body_and_share_it_where_no_seed_tells_them_apart() {
        let body = Bytes::from(json!({ "messages": [{ "role": "user", "content": "é" }], "n": 3 }).to_string());
        let made = parts(&body, 1, 3, 128, 1 << 20).unwrap();
        assert!(made.bodies.iter().all(|part| part.as_ptr() == made.bodies[0].as_ptr()));
        assert_eq!(&made.bodies[0], &json!({ "messages": [{ "role": "user", "content": "é" }], "n": 1 }).to_string());
        let odd = json!({ "messages": [], "n": 2, "seed": "x" });
        assert_eq!(of(&odd, 1, 2, ALL).unwrap()[1]["seed"], "x", "the engine says what is wrong with it");
        let last = json!({ "messages": [], "n": 2, "seed": i64::MAX });
        assert_eq!(of(&last, 1, 2, ALL).unwrap()[1]["seed"], i64::MIN);
    }

    #[test]
    fn what_cannot_be_taken_apart_is_refused_by_name() {
        let refused = |body: Value, prompts, choices, all| of(&body, prompts, choices, all).unwrap_err();
        let best = refused(json!({ "prompt": "a", "n": 2, "best_of": 3 }), 1, 2, ALL);
        assert!(best.starts_with("`best_of` is another number than `n`; leave it out"), "{best}");
        let beams = refused(json!({ "prompt": "a", "n": 2, "use_beam_search": true }), 1, 2, ALL);
        assert!(beams.starts_with("`use_beam_search` is set"), "{beams}");
        let many = refused(json!({ "prompt": ["a", "b"], "n": 65 }), 2, 130, ALL);
        assert!(
            many.starts_with("`prompt` is such that 130 choices are asked for") && many.ends_with("at most 128 in one request"),
            "{many}"
        );
        let large = refused(json!({ "prompt": "a".repeat(100), "n": 20 }), 1, 20, (128, 1000));
        assert!(large.starts_with("`n` is too many for a body of") && large.contains("limits.max_body_bytes"), "{large}");
    }
}
