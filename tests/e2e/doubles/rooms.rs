//! SGLang 0.5.23 with `--disaggregation-mode`, after its source: two legs of one body meet in a room of the prefill engine's
//! bootstrap server.
//!
//! One room is for one answer: with `n` above 1, or several prompts and one room, all of them would meet there, and real engines hang or garble
//! that. A leg that waits for the other one too long fails, as there (`SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT`), and so does one
//! without a room: these engines serve nothing else.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    MODEL, Network, Part, UntilTheEnd,
    server::{Answer, Asked, Cut, Manners, Server},
    speech::Speech,
};

/// How long a leg waits for the other one. It is 300 s there.
const BOOTSTRAP_TIMEOUT: Duration = Duration::from_secs(20);
/// What it refuses to be seeded with, a stream only after some words.
pub(crate) const REFUSED_SEED: i64 = 666;
/// Fields in which the two legs of a request differ.
const OF_ONE_LEG: [&str; 3] = ["rid", "routed_dp_rank", "priority"];

/// Rooms by the bootstrap server's address.
#[derive(Default)]
pub(crate) struct Rooms(HashMap<(String, u16), HashMap<u64, Room>>);

struct Room {
    legs: watch::Sender<[Option<Value>; 2]>,
}

/// What an engine does instead of what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its streams end after so many tokens.
    Cut(u64, Cut),
    /// As one whose transfer of KV fails: an error object, in a stream if it is asked for one.
    Transfer,
}

/// A running double.
pub(crate) struct Sglang {
    server: Server,
    manners: Arc<Engine>,
}

struct Engine {
    network: Arc<Network<Rooms>>,
    part: Part,
    bootstrap: (String, u16),
    /// Holds the port.
    _bootstrap: TcpListener,
    aborted: Mutex<Vec<String>>,
    /// Requests by the ids that they were given, aborts apart.
    rids: Mutex<Vec<String>>,
    /// What goes wrong with the next requests.
    faults: Mutex<VecDeque<Fault>>,
}

impl Sglang {
    pub(crate) async fn start(part: Part, network: &Arc<Network<Rooms>>) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), part, network).await
    }

    pub(crate) async fn start_at(address: SocketAddr, part: Part, network: &Arc<Network<Rooms>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bootstrap = ("127.0.0.1".to_owned(), listener.local_addr().unwrap().port());
        if part == Part::Prefill {
            network.here.lock().unwrap().0.insert(bootstrap.clone(), HashMap::new());
        }
        let (aborted, rids, faults) = Default::default();
        let network = Arc::clone(network);
        let manners = Arc::new(Engine { network, part, bootstrap, _bootstrap: listener, aborted, rids, faults });
        Self { server: Server::start_at(address, Arc::clone(&manners)).await, manners }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Has the next requests go wrong, one by one.
    pub(crate) fn suffer(&self, faults: impl IntoIterator<Item = Fault>) {
        self.manners.faults.lock().unwrap().extend(faults);
    }

    /// From here on nothing goes wrong.
    pub(crate) fn recover(&self) {
        self.manners.faults.lock().unwrap().clear();
    }

    /// Faults that are still to come.
    pub(crate) fn to_suffer(&self) -> usize {
        self.manners.faults.lock().unwrap().len()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.server.address)
    }

    pub(crate) fn bootstrap_port(&self) -> u16 {
        self.manners.bootstrap.1
    }

    /// Requests for tokens so far.
    pub(crate) fn asked(&self) -> usize {
        self.manners.rids.lock().unwrap().len()
    }

    /// Whether a request of it was aborted by name.
    pub(crate) fn was_told_to_abort(&self) -> bool {
        let rids = self.manners.rids.lock().unwrap();
        self.manners.aborted.lock().unwrap().iter().any(|aborted| rids.contains(aborted))
    }
}

impl Manners for Engine {
    async fn answer(self: Arc<Self>, asked: Asked) -> Answer {
        let ok = |body: Value| Answer::Whole("200 OK", body.to_string());
        match asked.line.as_str() {
            "get /ready" | "get /health" => ok(json!({})),
            "get /v1/models" => ok(
                json!({ "object": "list", "data": [{ "id": MODEL, "object": "model", "owned_by": "sglang", "max_model_len": 32_768 }] }),
            ),
            "get /server_info" => {
                let mode = match self.part {
                    Part::Prefill => "prefill",
                    Part::Decode => "decode",
                    Part::Whole => "null",
                };
                ok(json!({ "page_size": 64, "chunked_prefill_size": 8192, "disaggregation_mode": mode, "version": "0.5.23" }))
            }
            "get /v1/loads?format=json" => {
                ok(json!({ "loads": [{ "dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0 }] }))
            }
            "post /abort_request" => {
                let body: Value = serde_json::from_str(&asked.body).unwrap();
                self.aborted.lock().unwrap().extend(body["rid"].as_str().map(str::to_owned));
                ok(json!({}))
            }
            "post /v1/chat/completions" => self.leg(true, &asked.body).await,
            "post /v1/completions" => self.leg(false, &asked.body).await,
            _ => Answer::Whole("404 Not Found", r#"{"detail":"Not Found"}"#.to_owned()),
        }
    }
}

impl Engine {
    async fn leg(self: Arc<Self>, chat: bool, body: &str) -> Answer {
        let Ok(body) = serde_json::from_str::<Value>(body) else { return refusal("the body is no JSON") };
        let rid = body["rid"].as_str().unwrap_or_default().to_owned();
        self.rids.lock().unwrap().push(rid.clone());
        let speech = Speech::read(chat, &body);
        if self.part == Part::Whole {
            // It does not look at rooms.
            return speech.answer();
        }
        let fault = self.faults.lock().unwrap().pop_front();
        if fault == Some(Fault::Transfer) && self.part == Part::Prefill {
            return transfer_failed(speech.stream);
        }
        let end = UntilTheEnd::of(&self.network);
        let met = tokio::select! {
            met = self.meet(&body) => met,
            () = self.is_aborted(&rid) => Err("aborted".to_owned()),
        };
        end.came();
        if let Err(reason) = met {
            return refusal(&reason);
        }
        let is_refused = speech.seed == Some(REFUSED_SEED) && self.part == Part::Decode;
        if is_refused && !speech.stream {
            return refusal("it does not like its seed");
        }
        // The prefill engine makes a token that nobody reads.
        let tokens = if self.part == Part::Prefill { speech.max_tokens.min(1) } else { speech.max_tokens };
        if fault == Some(Fault::Transfer) {
            return transfer_failed(speech.stream);
        }
        if self.part == Part::Decode {
            self.network.handed();
        }
        if let Some(Fault::Cut(after, cut)) = fault.filter(|_| speech.stream) {
            let mut events = speech.events(after);
            // Neither its finish nor its usage.
            events.retain(|event| !event.contains(r#""finish_reason":"length""#) && event.contains(r#""index":0"#));
            return Answer::Cut(events, cut);
        }
        if speech.stream {
            let end = UntilTheEnd::of(&self.network);
            let mut events = speech.events(tokens);
            if is_refused {
                events.truncate(3);
                events.push(
                    json!({ "error": { "message": "it does not like its seed", "type": "BadRequest", "code": 400 } }).to_string(),
                );
            }
            return Answer::Stream(events, speech.pace(), Box::new(move || end.came()));
        }
        Answer::Whole("200 OK", speech.whole(tokens, "length").to_string())
    }

    /// Waits for the other leg in the room that the body names.
    async fn meet(&self, body: &Value) -> Result<(), String> {
        let (address, number) = self.room_of(body)?;
        let has_batch = body["prompt"].as_array().is_some_and(|prompts| !prompts.iter().all(Value::is_u64));
        if has_batch || body["n"].as_u64().is_some_and(|n| n > 1) {
            self.network.fault(format!("room {number} is to hold several answers"));
            return Err("one room is for one answer".to_owned());
        }
        let (mine, theirs) = if self.part == Part::Prefill { (0, 1) } else { (1, 0) };
        let mut same = body.clone();
        OF_ONE_LEG.iter().for_each(|name| drop(same.as_object_mut().unwrap().remove(*name)));
        let mut legs = {
            let mut rooms = self.network.here.lock().unwrap();
            let Some(rooms) = rooms.0.get_mut(&address) else {
                self.network.fault(format!("nobody prefills at {address:?}"));
                return Err(format!("no bootstrap server at {address:?}"));
            };
            let room = rooms.entry(number).or_insert_with(|| Room { legs: watch::channel([None, None]).0 });
            if room.legs.borrow()[mine].is_some() {
                self.network.fault(format!("room {number} is used a second time"));
                return Err(format!("room {number} is taken"));
            }
            room.legs.send_modify(|legs| legs[mine] = Some(same.clone()));
            room.legs.subscribe()
        };
        let met = timeout(BOOTSTRAP_TIMEOUT, legs.wait_for(|legs| legs[theirs].is_some())).await;
        let Ok(Ok(legs)) = met else {
            self.network.fault(format!("only the {:?} leg came to room {number}", self.part));
            return Err(format!("room {number}: the other side did not come"));
        };
        if legs[theirs].as_ref() != Some(&same) {
            self.network.fault(format!("the legs of room {number} differ: {:?}", *legs));
            return Err("the legs differ".to_owned());
        }
        Ok(())
    }

    fn room_of(&self, body: &Value) -> Result<((String, u16), u64), String> {
        let host = body["bootstrap_host"].as_str();
        let port = body["bootstrap_port"].as_u64().and_then(|port| u16::try_from(port).ok());
        let room = body["bootstrap_room"].as_i64();
        let (Some(host), Some(port), Some(room)) = (host, port, room) else {
            return Err("Disaggregated request received without bootstrap room id.".to_owned());
        };
        // Room 0 is its own, for warming up.
        let room = u64::try_from(room).ok().filter(|&room| room > 0).ok_or("a room of 63 bits is expected")?;
        let address = (host.to_owned(), port);
        if self.part == Part::Prefill && address != self.bootstrap {
            self.network.fault(format!("the prefill engine at {:?} was told to meet at {address:?}", self.bootstrap));
            return Err("this is not its bootstrap server".to_owned());
        }
        Ok((address, room))
    }

    async fn is_aborted(&self, rid: &str) {
        while rid.is_empty() || !self.aborted.lock().unwrap().iter().any(|aborted| rid.starts_with(aborted.as_str())) {
            sleep(Duration::from_millis(5)).await;
        }
    }
}

fn transfer_failed(stream: bool) -> Answer {
    let message = "Decode transfer failed for request rank=0";
    let error = json!({ "object": "error", "message": message, "type": "InternalServerError", "param": null, "code": 500 });
    if stream {
        return Answer::Stream(vec![json!({ "error": error }).to_string()], Duration::ZERO, Box::new(|| ()));
    }
    Answer::Whole("500 Internal Server Error", error.to_string())
}

fn refusal(message: &str) -> Answer {
    let error = json!({ "object": "error", "message": message, "type": "Bad Request", "param": null, "code": 400 });
    Answer::Whole("400 Bad Request", error.to_string())
}
