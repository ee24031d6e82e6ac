#!/usr/bin/env python3
"""The official Anthropic client against a running host, as its users meet it.

    HOST_URL=http://127.0.0.1:8080 HOST_KEY=dh-... test_client.py

HOST_URL is the front door of a host over a mock engine of model `m`, which demands the API key HOST_KEY. The end-to-end
tests start it. Needs the package `anthropic` 2.
"""

import asyncio
import os
import unittest

import anthropic

HOST_URL = os.environ["HOST_URL"]
HOST_KEY = os.environ["HOST_KEY"]
MODEL = "m"
MESSAGES = [{"role": "user", "content": "count"}]
# Longer than anything here takes; a wait that reaches it has failed.
PATIENCE_S = 30
# Retries would hide an error.
OPTIONS = {"base_url": HOST_URL, "api_key": HOST_KEY, "max_retries": 0, "timeout": PATIENCE_S}


def numbered(count):
    """What the mock engine says in `count` tokens: a lost or doubled one shows."""
    return " ".join(f"t{i}" for i in range(count))


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.client = anthropic.Anthropic(**OPTIONS)
        self.addCleanup(self.client.close)


class Messages(ClientTest):
    def test_a_message_is_answered_whole(self):
        answer = self.client.messages.create(model=MODEL, max_tokens=12, system="be brief", messages=MESSAGES)
        self.assertEqual([block.type for block in answer.content], ["text"])
        self.assertEqual(answer.content[0].text, numbered(12))
        self.assertEqual((answer.role, answer.stop_reason, answer.type), ("assistant", "max_tokens", "message"))
        self.assertEqual(answer.usage.output_tokens, 12)
        self.assertTrue(answer._request_id)

    def test_content_blocks_and_tools_are_taken(self):
        blocks = [
            {"role": "user", "content": [{"type": "text", "text": "count"}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "2"}]},
        ]
        tools = [{"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}]
        answer = self.client.messages.create(model=MODEL, max_tokens=3, messages=blocks, tools=tools)
        self.assertEqual(answer.content[0].text, numbered(3))

    def test_a_stop_sequence_ends_it(self):
        answer = self.client.messages.create(model=MODEL, max_tokens=9, messages=MESSAGES, stop_sequences=[" t4"])
        self.assertEqual((answer.content[0].text, answer.stop_reason), (numbered(4), "stop_sequence"))
        self.assertEqual(answer.stop_sequence, " t4")

    def test_raw_events_are_complete_and_in_order(self):
        stream = self.client.messages.create(model=MODEL, max_tokens=30, messages=MESSAGES, stream=True)
        kinds, text = [], ""
        for event in stream:
            kinds.append(event.type)
            if event.type == "content_block_delta":
                text += event.delta.text
        self.assertEqual(text, numbered(30))
        self.assertEqual(kinds[:2], ["message_start", "content_block_start"])
        self.assertEqual(kinds[-3:], ["content_block_stop", "message_delta", "message_stop"])

    def test_the_streaming_helper_collects_the_same(self):
        with self.client.messages.stream(model=MODEL, max_tokens=20, messages=MESSAGES) as stream:
            self.assertEqual("".join(stream.text_stream), numbered(20))
            final = stream.get_final_message()
        self.assertEqual((final.content[0].text, final.stop_reason), (numbered(20), "max_tokens"))
        self.assertEqual(final.usage.output_tokens, 20)

    def test_many_streams_at_once_by_the_asynchronous_client(self):
        async def one(client, count):
            async with client.messages.stream(model=MODEL, max_tokens=count, messages=MESSAGES) as stream:
                return "".join([text async for text in stream.text_stream])

        async def all_of_them():
            async with anthropic.AsyncAnthropic(**OPTIONS) as client:
                return await asyncio.gather(*(one(client, 10 + i) for i in range(16)))

        self.assertEqual(asyncio.run(all_of_them()), [numbered(10 + i) for i in range(16)])

    def test_tokens_are_counted(self):
        counted = self.client.messages.count_tokens(model=MODEL, system="be brief", messages=MESSAGES)
        answer = self.client.messages.create(model=MODEL, max_tokens=1, system="be brief", messages=MESSAGES)
        self.assertGreater(counted.input_tokens, 0)
        usage = answer.usage
        self.assertEqual(counted.input_tokens, usage.input_tokens + (usage.cache_read_input_tokens or 0))


class Models(ClientTest):
    def test_they_are_listed_and_found(self):
        self.assertEqual([(model.id, model.type) for model in self.client.models.list()], [(MODEL, "model")])
        self.assertEqual(self.client.models.retrieve(MODEL).display_name, MODEL)


class Errors(ClientTest):
    def fails(self, error, kind, client=None, **request):
        with self.assertRaises(error) as caught:
            (client or self.client).messages.create(**{"model": MODEL, "max_tokens": 2, "messages": MESSAGES, **request})
        failure = caught.exception
        self.assertEqual((failure.body["type"], failure.body["error"]["type"]), ("error", kind))
        self.assertTrue(failure.body["error"]["message"])
        self.assertTrue(failure.request_id)
        return failure

    def test_an_unknown_model(self):
        self.assertIn("gpt-17", self.fails(anthropic.NotFoundError, "not_found_error", model="gpt-17").message)

    def test_an_error_of_a_stream_comes_before_its_first_event(self):
        self.fails(anthropic.NotFoundError, "not_found_error", model="gpt-17", stream=True)

    def test_a_field_of_the_wrong_type(self):
        self.assertIn("max_tokens", self.fails(anthropic.BadRequestError, "invalid_request_error", max_tokens="many").message)

    def test_no_messages(self):
        self.assertIn("messages", self.fails(anthropic.BadRequestError, "invalid_request_error", messages=[]).message)

    def test_a_wrong_key(self):
        with anthropic.Anthropic(**{**OPTIONS, "api_key": "dh-wrong"}) as stranger:
            self.fails(anthropic.AuthenticationError, "authentication_error", client=stranger)
            with self.assertRaises(anthropic.AuthenticationError):
                stranger.messages.count_tokens(model=MODEL, messages=MESSAGES)
            with self.assertRaises(anthropic.AuthenticationError):
                stranger.models.list()

    def test_a_key_as_a_bearer_token(self):
        options = {key: value for key, value in OPTIONS.items() if key != "api_key"}
        with anthropic.Anthropic(**options, auth_token=HOST_KEY) as client:
            answer = client.messages.create(model=MODEL, max_tokens=2, messages=MESSAGES)
            self.assertEqual(answer.content[0].text, numbered(2))

    def test_the_engines_own_error_passes(self):
        with self.assertRaises(anthropic.BadRequestError) as caught:
            self.client.messages.create(model=MODEL, max_tokens=1_000_000, messages=MESSAGES, stream=False)
        self.assertIn("max_model_len=", caught.exception.body["error"]["message"])

    def test_a_path_that_is_not_there(self):
        with self.assertRaises(anthropic.NotFoundError) as caught:
            self.client.messages.batches.list()
        self.assertEqual(caught.exception.body["error"]["type"], "not_found_error")


if __name__ == "__main__":
    unittest.main()
