//! A real vLLM stopped, and killed, within a stream, with a second one beside it.

use dynamo_engine_api::conformance::closed_port;
use dynamo_engine_openai::{OpenAiEngine, OpenAiOptions};

use super::VllmServer;
use crate::{
    engine::{MODEL, chat, completion},
    harness::{client::Client, host::Host},
    killed::{Answer, counted, struck},
};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// After some hundreds of tokens rounding shows: a prompt's KV is computed at once, an output's token by token.
const TOKENS: u32 = 96;

#[tokio::test]
async fn a_stream_whose_vllm_is_stopped_or_killed_says_what_it_would_have_said() {
    let flags: [&str; 0] = [];
    let mut servers = [(), ()].map(|()| VllmServer::start_at(closed_port().unwrap(), &flags));
    for server in &mut servers {
        let adapter = OpenAiEngine::new(&server.url, OpenAiOptions::default()).unwrap();
        server.alive(&adapter).await;
    }
    let workers = ["a", "b"]
        .map(|name| if name == "a" { &servers[0] } else { &servers[1] }.url.clone() + &format!(",name={name},model={MODEL}"));
    let host = Host::start(&["--expose-worker", "--worker", &workers[0], "--worker", &workers[1]]).await;

    let undisturbed =
        async |path: &str, body: &serde_json::Value| Answer::of(&Client::new(&servers[1].url).stream(path, body).await, path);
    let mut asked = completion("The router reads a prompt", TOKENS);
    asked["ignore_eos"] = true.into();
    let asked = counted(asked);
    let expected = undisturbed(COMPLETIONS, &asked).await;
    let place = |worker: &str| usize::from(worker != "a");
    let mut stopped = 0;
    let stop = |worker: &str| {
        stopped = place(worker);
        servers[stopped].signal("STOP");
    };
    let (before, answer) = struck(&host, COMPLETIONS, &asked, 20, stop).await;
    servers[stopped].signal("CONT");
    assert_eq!(answer, expected, "stopped after {before:?}");
    println!("stopped after {} bytes of {}", before.len(), answer.text.len());
    host.workers_are("healthy").await;

    let mut asked = chat("Tell me about the sea.", TOKENS);
    asked["ignore_eos"] = true.into();
    let asked = counted(asked);
    let expected = undisturbed(CHAT, &asked).await;
    let (before, answer) = struck(&host, CHAT, &asked, 20, |worker| servers[place(worker)].signal("KILL")).await;
    assert_eq!(answer, expected, "killed after {before:?}");
    println!("killed after {} bytes of {}", before.len(), answer.text.len());
}
