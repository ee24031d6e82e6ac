//! The list of models as servers write it.

use dynamo_engine_api::ModelCard;
use serde::Deserialize;

/// Reads the body of `GET /v1/models`.
///
/// The longest context is `max_model_len` (vLLM, SGLang; null for a LoRA adapter) or `meta.n_ctx` (llama.cpp, where it is
/// one slot's share).
pub(crate) fn parse(body: &[u8]) -> Result<Vec<ModelCard>, serde_json::Error> {
    let list: List = serde_json::from_slice(body)?;
    let card = |model: Model| {
        let max_model_len = model.max_model_len.or(model.meta.and_then(|meta| meta.n_ctx));
        ModelCard { id: model.id, max_model_len, parent: model.parent }
    };
    Ok(list.data.into_iter().map(card).collect())
}

/// Who the servers of the list say they are; none if there is no list, or it does not say.
pub(crate) fn owner(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Owners {
        data: Vec<Owner>,
    }
    #[derive(Deserialize)]
    struct Owner {
        #[serde(default)]
        owned_by: Option<String>,
    }
    let list: Owners = serde_json::from_slice(body).ok()?;
    list.data.into_iter().find_map(|model| model.owned_by)
}

#[derive(Deserialize)]
struct List {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    max_model_len: Option<u32>,
    #[serde(default)]
    meta: Option<Meta>,
}

#[derive(Deserialize)]
struct Meta {
    #[serde(default)]
    n_ctx: Option<u32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(body: &str, expected: &[(&str, Option<u32>)]) {
        let cards = parse(body.as_bytes()).unwrap();
        let cards: Vec<_> = cards.iter().map(|card| (card.id.as_str(), card.max_model_len)).collect();
        assert_eq!(cards, expected);
    }

    #[test]
    fn vllm_states_the_length_of_the_base_model_only() {
        check(include_str!("../tests/fixtures/vllm_models.json"), &[("tiny-qwen3", Some(4096)), ("sql", None)]);
    }

    #[test]
    fn llama_cpp_states_it_in_meta() {
        check(include_str!("../tests/fixtures/llama_models.json"), &[("tiny-qwen3", Some(2048))]);
    }

    #[test]
    fn sglang_states_it_as_vllm_does() {
        check(include_str!("../tests/fixtures/sglang_models.json"), &[("tiny-qwen3", Some(4096))]);
    }

    #[test]
    fn an_adapter_names_its_base_model() {
        let cards = parse(include_bytes!("../tests/fixtures/vllm_models.json")).unwrap();
        let parents: Vec<_> = cards.iter().map(|card| card.parent.as_deref()).collect();
        assert_eq!(parents, [None, Some("tiny-qwen3")]);
    }

    #[test]
    fn servers_name_themselves() {
        for (body, name) in [
            (include_str!("../tests/fixtures/vllm_models.json"), Some("vllm")),
            (include_str!("../tests/fixtures/sglang_models.json"), Some("sglang")),
            (include_str!("../tests/fixtures/trtllm_models.json"), Some("tensorrt_llm")),
            (include_str!("../tests/fixtures/llama_models.json"), Some("llamacpp")),
            (r#"{"data":[]}"#, None),
            (r#"{"data":[{"id":"m"}]}"#, None),
            ("Internal Server Error", None),
        ] {
            assert_eq!(owner(body.as_bytes()).as_deref(), name, "{body}");
        }
    }

    #[test]
    fn others_state_none() {
        check(r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#, &[("m", None)]);
    }

    #[test]
    fn what_is_no_list_is_an_error() {
        assert!(parse(b"Internal Server Error").is_err());
        assert!(parse(b"{}").is_err());
    }
}
