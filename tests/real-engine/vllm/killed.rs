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
const TOKENS: u32 = 400;
/// In bfloat16, which other tests run, a resumed answer is not always its own continuation, also without the host: where the
/// two likeliest tokens are as good as equal, a prompt's KV, computed at once, and an output's, token by token, round to
/// different sides. Of 48 answers of 400 tokens that were asked of vLLM itself for their rest, from 12 places, 5 went astray
/// after 117 to 252 tokens; in float32 none of those 48, and none of 104 more.
const FLAGS: [&str; 2] = ["--dtype", "float32"];

#[tokio::test]
async fn a_stream_whose_vllm_is_stopped_or_killed_says_what_it_would_have_said() {
    let mut servers = [(), ()].map(|()| VllmServer::start_at(closed_port().unwrap(), &FLAGS));
    for server in &mut servers {
        let adapter = OpenAiEngine::new(&server.url, OpenAiOptions::default()).unwrap();
        server.alive(&adapter).await;
    }
    let workers = ["a", "b"]
        .map(|name| if name == "a" { &servers[0] } else { &servers[1] }.url.clone() + &format!(",name={name},model={MODEL}"));
    let host = Host::start(&["--expose-worker", "--worker", &workers[0], "--worker", &workers[1]]).await;

    let undisturbed =
        async |path: &str, body: &serde_json::Value| Answer::of(&Client::new(&servers[1].url).stream(path, body).await, path);
    let place = |worker: &str| usize::from(worker != "a");
    for after in [20, 250] {
        let mut asked = completion("The router reads a prompt", TOKENS);
        asked["ignore_eos"] = true.into();
        let asked = counted(asked);
        let expected = undisturbed(COMPLETIONS, &asked).await;
        let mut stopped = 0;
        let stop = |worker: &str| {
            stopped = place(worker);
            servers[stopped].signal("STOP");
        };
        let (before, answer) = struck(&host, COMPLETIONS, &asked, after, stop).await;
        servers[stopped].signal("CONT");
        assert_eq!(answer, expected, "stopped after {before:?}");
        println!("stopped after {} bytes of {}", before.len(), answer.text.len());
        host.workers_are("healthy").await;
    }

    let mut asked = chat("Tell me about the sea.", TOKENS);
    asked["ignore_eos"] = true.into();
    let asked = counted(asked);
    let expected = undisturbed(CHAT, &asked).await;
    let (before, answer) = struck(&host, CHAT, &asked, 200, |worker| servers[place(worker)].signal("KILL")).await;
    assert_eq!(answer, expected, "killed after {before:?}");
    println!("killed after {} bytes of {}", before.len(), answer.text.len());
}
