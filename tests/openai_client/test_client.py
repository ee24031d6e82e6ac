#!/usr/bin/env python3
"""The official OpenAI client against a running host, as its users meet it.

    HOST_URL=http://127.0.0.1:8080 ENGINE_URL=http://127.0.0.1:8000 STREAMS_URL=... KEYS_URL=... HOST_KEY=... test_client.py

HOST_URL is the front door of a host with --expose-worker and the policy least-loaded, over one mock engine of model `m`
whose own address is ENGINE_URL. STREAMS_URL is that of a host over a mock engine in its process, KEYS_URL that of a host
that demands the API key HOST_KEY. The end-to-end tests start all of them. Needs the package `openai` 3.
"""

import asyncio
import os
import time
import unittest
import urllib.request

import openai

HOST_URL = os.environ["HOST_URL"]
ENGINE_URL = os.environ["ENGINE_URL"]
STREAMS_URL = os.environ["STREAMS_URL"]
KEYS_URL = os.environ["KEYS_URL"]
HOST_KEY = os.environ["HOST_KEY"]
MODEL = "m"
MESSAGES = [{"role": "user", "content": "count"}]
# Longer than anything here takes; a wait that reaches it has failed.
PATIENCE_S = 30


def client(url=HOST_URL, api_key="unused"):
    # Retries would hide an error.
    return openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_S)


def numbered(count):
    """What the mock engine says in `count` tokens: a lost or doubled one shows."""
    return " ".join(f"t{i}" for i in range(count))


def running():
    """Requests that the engine works on, by its own account."""
    with urllib.request.urlopen(f"{ENGINE_URL}/metrics", timeout=PATIENCE_S) as page:
        for line in page.read().decode().splitlines():
            if line.startswith("vllm:num_requests_running{"):
                return float(line.split()[-1])
    raise AssertionError("the engine shows no vllm:num_requests_running")


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.client = client()
        self.addCleanup(self.client.close)

    def wait_until_running(self, wanted):
        give_up = time.monotonic() + PATIENCE_S
        while running() != wanted:
            self.assertLess(time.monotonic(), give_up, f"the engine works on {running()} requests, not on {wanted}")
            time.sleep(0.005)


class Chat(ClientTest):
    def test_a_chat_is_answered_whole(self):
        answer = self.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12)
        choice = answer.choices[0]
        self.assertEqual(choice.message.content, numbered(12))
        self.assertEqual((choice.message.role, choice.finish_reason), ("assistant", "length"))
        self.assertEqual(answer.usage.completion_tokens, 12)
        self.assertEqual(answer.object, "chat.completion")

    def test_a_chat_is_streamed_complete_and_in_order(self):
        stream = self.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=40, stream=True, stream_options={"include_usage": True}
        )
        text, reasons, usage = "", [], None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if choice.finish_reason:
                    reasons.append(choice.finish_reason)
        self.assertEqual(text, numbered(40))
        self.assertEqual(reasons, ["length"])
        self.assertEqual(usage.completion_tokens, 40)

    def test_the_streaming_helper_collects_the_same(self):
        with self.client.chat.completions.stream(model=MODEL, messages=MESSAGES, max_tokens=20) as stream:
            for _ in stream:
                pass
            # Its own parser refuses answers that were cut by max_tokens; the snapshot is what it collected.
            self.assertEqual(stream.current_completion_snapshot.choices[0].message.content, numbered(20))

    def test_many_streams_at_once_by_the_asynchronous_client(self):
        async def one(asynchronous, count):
            stream = await asynchronous.chat.completions.create(
                model=MODEL, messages=MESSAGES, max_tokens=count, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        async def all_of_them():
            options = {"base_url": f"{HOST_URL}/v1", "api_key": "unused", "max_retries": 0, "timeout": PATIENCE_S}
            async with openai.AsyncOpenAI(**options) as asynchronous:
                return await asyncio.gather(*(one(asynchronous, 10 + i) for i in range(16)))

        self.assertEqual(asyncio.run(all_of_them()), [numbered(10 + i) for i in range(16)])

    def test_several_choices_and_a_stop_string(self):
        answer = self.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=9, n=2, stop=[" t4"])
        self.assertEqual([choice.message.content for choice in answer.choices], [numbered(4)] * 2)
        self.assertEqual([choice.finish_reason for choice in answer.choices], ["stop"] * 2)


class Completions(ClientTest):
    def test_a_prompt_of_text(self):
        answer = self.client.completions.create(model=MODEL, prompt="count", max_tokens=7)
        self.assertEqual((answer.choices[0].text, answer.choices[0].finish_reason), (numbered(7), "length"))

    def test_a_prompt_of_token_ids(self):
        answer = self.client.completions.create(model=MODEL, prompt=[11, 22, 33], max_tokens=5)
        self.assertEqual(answer.choices[0].text, numbered(5))
        self.assertEqual(answer.usage.prompt_tokens, 3)

    def test_a_stream(self):
        stream = self.client.completions.create(model=MODEL, prompt="count", max_tokens=25, stream=True)
        self.assertEqual("".join(chunk.choices[0].text for chunk in stream), numbered(25))


class Models(ClientTest):
    def test_they_are_listed(self):
        models = list(self.client.models.list())
        self.assertEqual([model.id for model in models], [MODEL])
        self.assertEqual(models[0].object, "model")

    def test_one_is_found_by_its_name(self):
        self.assertEqual(self.client.models.retrieve(MODEL).id, MODEL)
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.models.retrieve("org/gpt-17")
        self.assertEqual(caught.exception.code, "model_not_found")


class Embeddings(ClientTest):
    def test_a_text_and_a_batch(self):
        # The client asks for base64 and decodes it.
        one = self.client.embeddings.create(model=MODEL, input="count")
        batch = self.client.embeddings.create(model=MODEL, input=["count", "sheep"])
        self.assertEqual([len(item.embedding) for item in batch.data], [64, 64])
        self.assertEqual(one.data[0].embedding, batch.data[0].embedding)
        self.assertNotEqual(batch.data[0].embedding, batch.data[1].embedding)
        self.assertAlmostEqual(sum(number * number for number in one.data[0].embedding), 1, places=4)
        self.assertGreater(batch.usage.prompt_tokens, 0)

    def test_token_ids_and_numbers_as_they_are(self):
        answer = self.client.embeddings.create(model=MODEL, input=[[1, 2], [3]], dimensions=8, encoding_format="float")
        self.assertEqual([len(item.embedding) for item in answer.data], [8, 8])
        self.assertEqual(answer.usage.total_tokens, 3)


class Responses(ClientTest):
    def test_a_response_is_answered_whole(self):
        answer = self.client.responses.create(model=MODEL, input="count", instructions="be brief", max_output_tokens=12)
        self.assertEqual(answer.output_text, numbered(12))
        self.assertEqual((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"))
        self.assertEqual(answer.usage.output_tokens, 12)

    def test_a_response_is_streamed_complete_and_in_order(self):
        with client(STREAMS_URL) as streams:
            stream = streams.responses.create(model=MODEL, input=MESSAGES, max_output_tokens=30, stream=True)
            events = list(stream)
        self.assertEqual("".join(event.delta for event in events if event.type == "response.output_text.delta"), numbered(30))
        self.assertEqual((events[0].type, events[-1].type), ("response.created", "response.completed"))
        self.assertEqual(events[-1].response.output_text, numbered(30))
        self.assertEqual([event.sequence_number for event in events], list(range(len(events))))

    def test_the_streaming_helper_collects_the_same(self):
        with client(STREAMS_URL) as streams:
            with streams.responses.stream(model=MODEL, input="count", max_output_tokens=9) as stream:
                for _ in stream:
                    pass
                self.assertEqual(stream.get_final_response().output_text, numbered(9))

    def test_what_one_engine_would_have_to_remember_is_refused(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.responses.create(model=MODEL, input="more", previous_response_id="resp_1")
        self.assertEqual((caught.exception.code, caught.exception.param), ("stateful_responses", "previous_response_id"))
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.responses.retrieve("resp_1")
        self.assertEqual(caught.exception.code, "stateful_responses")


class Keys(ClientTest):
    def test_the_right_key_is_let_in(self):
        with client(KEYS_URL, HOST_KEY) as friend:
            answer = friend.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
            self.assertEqual(answer.choices[0].message.content, numbered(3))

    def test_a_wrong_key_is_an_authentication_error_everywhere(self):
        with client(KEYS_URL, "dh-wrong") as stranger:
            for ask in [
                lambda: stranger.chat.completions.create(model=MODEL, messages=MESSAGES),
                lambda: stranger.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True),
                lambda: stranger.embeddings.create(model=MODEL, input="x"),
                lambda: stranger.responses.create(model=MODEL, input="x"),
                lambda: stranger.models.list(),
            ]:
                with self.assertRaises(openai.AuthenticationError) as caught:
                    ask()
                self.assertEqual(caught.exception.code, "invalid_api_key")


class Extras(ClientTest):
    def test_fields_that_only_the_engine_knows_pass(self):
        answer = self.client.completions.create(
            model=MODEL, prompt="count", max_tokens=3, extra_body={"return_token_ids": True, "a_field_of_tomorrow": {"x": [1]}}
        )
        self.assertEqual(len(answer.choices[0].token_ids), 3)

    def test_headers_tell_request_policy_and_worker(self):
        raw = self.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=MESSAGES, max_tokens=2, extra_headers={"x-request-id": "mine-7"}
        )
        self.assertEqual(raw.headers["x-request-id"], "mine-7")
        self.assertRegex(raw.headers["x-dynamo-policy"], r"^least-loaded@\d+\.\d+\.\d+$")
        self.assertEqual(raw.headers["x-dynamo-worker"], "engine")
        answer = raw.parse()
        self.assertEqual(answer.choices[0].message.content, numbered(2))
        self.assertEqual(answer._request_id, "mine-7")


class Errors(ClientTest):
    def fails(self, error, code, **request):
        with self.assertRaises(error) as caught:
            self.client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 2, **request})
        failure = caught.exception
        self.assertEqual(failure.code, code, failure)
        self.assertTrue(failure.message)
        self.assertTrue(failure.request_id)
        return failure

    def test_an_unknown_model(self):
        failure = self.fails(openai.NotFoundError, "model_not_found", model="gpt-17")
        self.assertEqual(failure.param, "model")

    def test_a_field_of_the_wrong_type(self):
        failure = self.fails(openai.BadRequestError, "invalid_field", max_tokens="many")
        self.assertEqual(failure.param, "max_tokens")

    def test_an_error_of_a_stream_comes_before_its_first_chunk(self):
        self.fails(openai.NotFoundError, "model_not_found", model="gpt-17", stream=True)

    def test_the_engines_own_error_passes(self):
        with self.assertRaises(openai.BadRequestError) as caught:
            self.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1_000_000)
        self.assertIn("max_model_len=", caught.exception.body["message"])

    def test_a_path_that_is_not_there(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.client.fine_tuning.jobs.list()
        self.assertEqual(caught.exception.code, "not_found")

    def test_a_host_that_is_not_there(self):
        with openai.OpenAI(base_url="http://127.0.0.1:1/v1", api_key="unused", max_retries=0) as nobody:
            with self.assertRaises(openai.APIConnectionError):
                nobody.models.list()


class Cancelling(ClientTest):
    def test_leaving_a_stream_frees_the_engine(self):
        self.wait_until_running(0)
        stream = self.client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20_000, stream=True)
        next(iter(stream))
        self.wait_until_running(1)
        stream.close()
        self.wait_until_running(0)

    def test_giving_up_on_an_answer_frees_the_engine(self):
        self.wait_until_running(0)

        async def give_up():
            options = {"base_url": f"{HOST_URL}/v1", "api_key": "unused", "max_retries": 0, "timeout": PATIENCE_S}
            async with openai.AsyncOpenAI(**options) as asynchronous:
                asked = asynchronous.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20_000)
                waiting = asyncio.create_task(asked)
                await asyncio.to_thread(self.wait_until_running, 1)
                waiting.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await waiting
                await asyncio.to_thread(self.wait_until_running, 0)

        asyncio.run(give_up())


if __name__ == "__main__":
    unittest.main()
