"""Small talk about the appliance: facts, each with one canonical answer and many wordings of its question.

A wording is a pattern in which `{a|b|c}` stands for one of its alternatives (no nesting; an alternative may be empty).
Standard library only.
"""
# ruff: noqa: E501 - one fact or pattern is one line

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from functools import cached_property

_CHOICE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Fact:
    """One answer, and the patterns of the questions that it answers."""

    answer: str
    patterns: tuple[str, ...]

    @cached_property
    def questions(self) -> tuple[str, ...]:
        """Every wording of the question, in a fixed order."""
        return tuple(dict.fromkeys(q for pattern in self.patterns for q in expand(pattern)))


def expand(pattern: str) -> list[str]:
    """All texts that a pattern stands for, with doubled spaces removed."""
    parts = _CHOICE.split(pattern)  # fixed, choice, fixed, choice, ..., fixed
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [re.sub(r" +", " ", "".join(combination)).strip() for combination in itertools.product(*options)]


def sample_question(rng: random.Random) -> tuple[str, str]:
    """A random (question, answer): facts equally likely, then wordings equally likely."""
    fact = FACTS[int(rng.random() * len(FACTS))]
    questions = fact.questions
    return questions[int(rng.random() * len(questions))], fact.answer


_HOW = "{how do I|how can I|how does one|what is the way to|please explain how to|tell me how to}"
_WHAT = "{what is|what's|please explain|explain|define|tell me what is meant by|what does one call|what do you mean by}"
_WHICH = "{which|what|please list the|tell me the|list all}"


def _term(noun: str, answer: str) -> Fact:
    """A fact that defines one word of the appliance."""
    return Fact(
        answer,
        (
            f"{_WHAT} {noun}{{| here| in the appliance| in this appliance}}?",
            f"{{can|could}} you {{explain|define|describe}} {noun}{{| to me| for me}}?",
            f"{{I want to|I would like to}} {{know|understand|learn}} what {noun} {{is|means}}.",
        ),
    )


FACTS: tuple[Fact, ...] = (
    Fact(
        "Hello! I am the built-in model of the appliance. Ask me about it, or give me a small task.",
        (
            "{hello|hi|hey|good morning|good evening|good day|greetings}{|, model| there|, appliance|, you}{|!|.}",
            "{hello|hi|hey}{| there}, {how are you|how is it going|nice to meet you|are you there}{?|}",
        ),
    ),
    Fact(
        "You are welcome.",
        (
            "{thanks|thank you|many thanks|thanks a lot|thank you very much}{|, model|, that helps|, that is all|, that was useful}{.|!|}",
        ),
    ),
    Fact(
        "Goodbye! I stay ready for the next request.",
        (
            "{bye|goodbye|see you|see you later|good night|farewell|until later}{|, model|, appliance| then|, my friend}{.|!|}",
        ),
    ),
    Fact(
        "I am the built-in model of the appliance: a small language model of Llama architecture, there to show that everything works.",
        (
            "{what|who} are you{| exactly| really}?",
            "{please |}{introduce|describe|present} yourself{| to me| briefly| in short}.",
            "{which|what} {model|language model|system} {are you|is this|am I talking to|answers me here}?",
            "{what kind of|which} {model|assistant} are you{| exactly}?",
        ),
    ),
    Fact(
        "I was trained from scratch in a few minutes on one GPU, on data that a script of the project generates.",
        (
            "{how|where|on what} were you {trained|made|built|created}{| by the project| exactly}?",
            "{what|which} {data|training data|texts} {were you trained on|did you learn from|do you come from}?",
            "{who|what} {trained|made|built|created} you?",
            "{how long|how many minutes} did {your training|it take to train you} {take|last}?",
        ),
    ),
    Fact(
        "I can add, subtract, multiply, sort numbers, copy words, recall values, write JSON, convert units and answer questions about the appliance.",
        (
            "what {can you do|are you able to do|are you good at|do you know|tasks do you know}{| for me| here}?",
            "{how|with what} can you help{| me| people| us}?",
            "{which|what} {tasks|jobs|things|questions} can {you|this model} {do|solve|answer|handle}?",
            "{list|name|tell me} your {skills|abilities|tasks}.",
        ),
    ),
    Fact(
        "I have about seven million parameters, fewer than 16 megabytes in bf16.",
        (
            "how {big|large|small} {are you|is this model|is the built-in model}{| exactly| really}?",
            "how many {parameters|weights} {do you have|does this model have|does the built-in model have}?",
            "what is {your size|the size of this model|your parameter count}?",
        ),
    ),
    Fact(
        "My context holds 4096 tokens, prompt and answer together.",
        (
            "how {long|large|big} is {your context|your context window|the context of this model}?",
            "how many tokens {fit into your context|can you read|can you take in|do you accept}?",
            "{what|which} context {length|size} {do you have|do you support|is yours}?",
        ),
    ),
    _term(
        "the appliance",
        "The appliance is a program that detects the hardware, selects a profile, builds or fetches an engine and serves it through an OpenAI-compatible API.",
    ),
    _term(
        "a profile",
        "A profile is a YAML file that says what to optimize for and what hardware that needs: precision, tensor-parallel size, KV cache and batching limits.",
    ),
    _term(
        "a checkpoint",
        "A checkpoint is the Hugging Face directory that a user brings: config, safetensors and tokenizer.",
    ),
    _term(
        "an engine",
        "An engine is the built artifact: a content-addressed directory that loads with no further work.",
    ),
    _term(
        "the builder",
        "The builder turns a checkpoint into an engine for this hardware: it converts, quantizes and writes the weights, and checks what it wrote.",
    ),
    _term("a page", "A page is a fixed number of token slots of the KV cache."),
    _term("a step", "A step is one forward pass of the in-flight batch."),
    _term("a rank", "A rank is one GPU's share of the model, with one process for each."),
    _term(
        "in-flight batching",
        "In-flight batching lets requests join and leave the running batch at every step, so that none waits for another to finish.",
    ),
    _term(
        "chunked prefill",
        "Chunked prefill splits a long prompt over several steps, so that other requests keep decoding beside it.",
    ),
    _term(
        "prefix caching",
        "Prefix caching keeps the pages of earlier prompts, so that a request that starts the same way skips that work.",
    ),
    _term(
        "the engine key",
        "The engine key is a hash of the checkpoint, precision, parallel sizes, compute capability, backend and builder version.",
    ),
    Fact(
        "Send GET /v1/health/ready: it answers 200 once inference works, and 503 with phase, percent and reason until then.",
        (
            f"{_HOW} {{check|see|test|find out|know}} {{readiness|whether it is ready|if the server is ready|whether the model is ready}}?",
            "{which|what} {endpoint|path|URL} {tells|shows|says} {readiness|whether it is ready|if the model is ready}?",
            "{is the|when is the} {server|model|appliance} ready{|, and how do I know}?",
        ),
    ),
    Fact(
        "Send GET /v1/health/live: it answers 200 as soon as the socket is served, whatever the engine is doing.",
        (
            f"{_HOW} {{check|see|test|find out}} {{liveness|whether it is alive|if the process lives|whether the server is up}}?",
            "{which|what} {endpoint|path|URL} {tells|shows|says} {liveness|whether it is alive|if the process lives}?",
        ),
    ),
    Fact(
        "The main endpoints are /v1/chat/completions, /v1/completions, /v1/models, /v1/health/live, /v1/health/ready, /v1/metadata and /metrics.",
        (
            f"{_WHICH} endpoints{{| are there| exist| do you have| does the server have| can I call}}?",
            "{which|what} {paths|routes|URLs} {are there|exist|does the server offer|can I call|are served}?",
            "what does the {API|HTTP API|interface} {offer|look like|consist of}?",
        ),
    ),
    Fact(
        "Nobody has to: the appliance selects one for the hardware. To choose yourself, set APPLIANCE_PROFILE to a name that list-model-profiles prints.",
        (
            f"{_HOW} {{choose|select|pick|set|change|force}} {{a profile|the profile|another profile|my own profile}}?",
            "{which|what} {setting|variable|option} {chooses|selects|picks|sets} the profile?",
        ),
    ),
    Fact(
        "Run select --explain: it lists every profile with its score or the rule that rejected it.",
        (
            f"{_HOW} {{see|find out|learn|understand}} why {{a profile|this profile|the profile}} was {{selected|chosen|rejected|picked}}?",
            "{why|for what reason} was {this profile|that profile|my profile} {selected|chosen|rejected|picked}?",
            "{which|what} command {explains|shows|justifies} the {selection|choice|profile selection}?",
        ),
    ),
    Fact(
        "Run list-model-profiles: it prints the profiles that are runnable, low on memory or incompatible here.",
        (
            f"{_HOW} {{list|see|print|show}} {{all profiles|the profiles|the available profiles}}?",
            "{which|what} profiles {are there|exist|can run here|are available|are compatible}?",
        ),
    ),
    Fact(
        "FP8 on Hopper GPUs such as the H100 and H200, and BF16 elsewhere, or FP16 where the GPU has no BF16. The policy wants INT4 there, which is not built yet.",
        (
            "{which|what} {precision|number format|quantization} {do you choose|is chosen|is selected|does the appliance use|is the default}?",
            "how is the {precision|number format|quantization} {chosen|selected|decided}?",
            "{when|where} {is FP8 used|is INT4 used|is BF16 used|do you use FP8|do you use INT4}?",
        ),
    ),
    Fact(
        "The server listens on port 8000. Set APPLIANCE_PORT or pass --port to change it.",
        (
            "{which|what} port {do you use|is it|is used|does the server listen on|does the appliance use|is the default}?",
            f"{_HOW} {{change|set|choose}} the {{port|server port|HTTP port}}?",
        ),
    ),
    Fact(
        "Run make serve in a clone, or ./entrypoint.py serve once it is installed.",
        (
            f"{_HOW} {{start|launch|run|bring up}} {{the appliance|the server|it|the container|everything}}?",
            "{which|what} command {starts|launches|runs} {the appliance|the server|it|the container}?",
        ),
    ),
    Fact(
        "Pass --model with a local directory or a hub id, or set APPLIANCE_MODEL.",
        (
            f"{_HOW} {{serve|use|load|run}} {{my own model|another model|a different model|a model from the hub}}?",
            "{can|could} {you|the appliance|the server} {serve|load|run} {my own model|another model|a different model}?",
            "{which|what} {setting|option} {chooses|names|sets} the model?",
        ),
    ),
    Fact(
        "Engines and downloads lie in the cache directory, which APPLIANCE_CACHE or --cache sets.",
        (
            "{where|in which directory} {are|do you keep|does the appliance keep} {engines|downloads|the engines|the cache|cached files}?",
            f"{_HOW} {{change|set|move}} the {{cache|cache directory|cache path}}?",
        ),
    ),
    Fact(
        "Yes. Without a GPU the CPU backend serves the model, more slowly; --require-gpu makes a missing GPU fatal.",
        (
            "{do I need|is it necessary to have|must I have} a {GPU|graphics card}{| for this| to run this| to start}?",
            "{does it|can it|can the appliance|does the appliance|will it} {run|work|start} {without a GPU|on a CPU|on a laptop|with no GPU}?",
        ),
    ),
    Fact(
        "Run doctor: it checks driver, GPUs, shared memory, cache directory, disk space and network before any download.",
        (
            f"{_HOW} {{check|diagnose|debug|test}} {{my machine|my installation|the machine|the system|a problem}}?",
            "{what|which things} does {the doctor command|doctor|the doctor} {do|check|test|look at}?",
            "{which|what} command {diagnoses|checks} {problems|my machine|the system}?",
        ),
    ),
    Fact(
        "Run bench quality: it reports the exact-match accuracy of each task on fresh samples that were never trained on.",
        (
            f"{_HOW} {{measure|test|check|benchmark}} {{quality|the quality|accuracy|your accuracy|how good you are}}?",
            "{which|what} command {measures|reports|tests} {quality|accuracy|the accuracy|how good you are}?",
            "how {good|accurate|reliable} are {you|your answers}?",
        ),
    ),
    Fact(
        "Run bench offline: it measures tokens per second without a server.",
        (
            f"{_HOW} {{measure|test|check|benchmark}} {{speed|the speed|throughput|tokens per second|performance}}?",
            "{which|what} command {measures|reports|tests} {speed|the speed|throughput|performance}?",
            "how {fast|quick} {are you|is the appliance|is it|is the server}?",
        ),
    ),
    Fact(
        "The server restarts the engine and submits the running requests again with the tokens already sent, so clients see a pause and not an error.",
        (
            "what {happens|do you do|does the server do} {if|when} {the engine crashes|the engine dies|the engine fails|the engine stops}?",
            "{does|will} a {crash of the engine|crashed engine|dead engine} {lose|end|break|fail} {my request|requests|running requests}?",
        ),
    ),
    Fact(
        "A damaged engine file is found by its digest at load, named in the log, and the engine is rebuilt.",
        (
            "what {happens|do you do} {if|when} {an engine file|an engine|the engine file} is {damaged|corrupt|truncated|broken}?",
            "{how are|are} {damaged|corrupt|truncated|broken} {engines|engine files} {detected|found|noticed|handled}?",
        ),
    ),
    Fact(
        "The first start builds the engine; later starts find it in the cache and load it directly.",
        (
            "why {is|was} the first {start|launch|run} {slow|slower|so slow|so long}?",
            "why {does|did} {it|the first start|the appliance} take {so long|long|longer} {the first time|at first|on the first start}?",
        ),
    ),
    Fact(
        "No. Batch size, context length and page count are chosen at load, so that changing them rebuilds nothing.",
        (
            "{does|will} {another|a new|a different} {batch size|context length|page count} {rebuild the engine|need a rebuild|mean a new engine}?",
            "{must|do} I {rebuild|build again} {for|after} {another|a new} {batch size|context length}?",
        ),
    ),
    Fact(
        "Set stream to true in the request; the tokens then arrive as server-sent events.",
        (
            f"{_HOW} {{stream|receive|get}} {{tokens|the answer|an answer|the output}} {{as they come|one by one|with streaming|as a stream}}?",
            "{do you|does the server|can the server|can you} {support streaming|stream|stream tokens|stream answers}?",
        ),
    ),
    Fact(
        "Yes. Point the OpenAI client at the server's address followed by /v1; any API key will do unless one is set.",
        (
            "{can|may|could} I use {the OpenAI client|the openai package|an OpenAI client|the OpenAI library}{| with this| here| with the appliance}?",
            "{are you|is the server|is the API|is the appliance} {OpenAI-compatible|compatible with OpenAI|like the OpenAI API}?",
        ),
    ),
    Fact(
        "GET /metrics gives Prometheus metrics: running and waiting requests, cache usage, tokens, and latencies.",
        (
            "{where|how} {are|do I find|can I see|do I get} {the metrics|metrics|statistics|Prometheus metrics}?",
            "{which|what} {metrics|statistics|Prometheus metrics} {are there|exist|do you report|does the server export}?",
        ),
    ),
    Fact(
        "GET /v1/models lists the names of the served models.",
        (
            f"{_HOW} {{list|see|find out|ask for}} {{the served models|which models are served|the names of the models|the models}}?",
            "{which|what} {endpoint|path} {lists|shows|names} the models?",
        ),
    ),
    Fact(
        "Set APPLIANCE_OFFLINE or HF_HUB_OFFLINE; then no outside socket is opened.",
        (
            f"{_HOW} {{run|use|start}} {{it|the appliance|the server}} {{offline|without network|in an air-gapped place|without internet}}?",
            f"{_HOW} {{forbid|prevent|disable|switch off}} {{downloads|model downloads|network access}}?",
        ),
    ),
    Fact(
        "Set APPLIANCE_MAX_MODEL_LEN or pass --max-model-len; requests that ask for more are refused.",
        (
            f"{_HOW} {{limit|set|change|reduce|shorten}} {{the context|the context length|the maximum length|the model length}}?",
            "{which|what} {setting|variable|option} {limits|sets|changes} the {context|context length|maximum length}?",
        ),
    ),
    Fact(
        "APPLIANCE_TP_SIZE sets the tensor-parallel size, but engines for more than one GPU are not built yet.",
        (
            f"{_HOW} {{use|set up|employ}} {{several GPUs|more GPUs|two GPUs|tensor parallelism}}?",
            "{which|what} {setting|variable|option} {sets|changes|controls} {the tensor-parallel size|tensor parallelism|the number of GPUs}?",
        ),
    ),
    Fact(
        "Command line first, then environment, config file, profile and default; serve --dry-run shows where each value came from.",
        (
            "{which|what} {setting|value|source} {wins|has precedence|comes first|takes precedence}?",
            "{what is the|in which} {precedence|order|priority} {of settings|of the settings|are settings read|do settings have}?",
        ),
    ),
    Fact(
        "Run serve --dry-run: it prints each setting with where it came from and starts nothing.",
        (
            f"{_HOW} {{see|print|show|inspect}} {{all settings|the settings|my settings|the configuration}}{{| without starting}}?",
            "what {does|is} {a dry run|the dry run|serve --dry-run|--dry-run} {do|for|good for}?",
        ),
    ),
    Fact(
        "It is reported with the nearest known name, and never silently ignored.",
        (
            "what {happens|do you do} {with|to} {an unknown setting|a misspelled setting|a wrong setting|a setting with a typo}?",
            "{are|will} {unknown settings|misspelled settings|wrong settings} {ignored|be ignored|reported|be reported}?",
        ),
    ),
    Fact(
        "Llama, Mistral, Qwen2 and Qwen3; adding one is adding one file to the models directory.",
        (
            "{which|what} {architectures|model families|kinds of model|models} {are supported|do you support|can be served|does the appliance support}?",
            f"{_HOW} {{add|support|write}} {{an architecture|a new architecture|another architecture|a model family}}?",
        ),
    ),
    Fact(
        "Only safetensors: no pickle and no remote code.",
        (
            "{which|what} {weight formats|file formats|formats|kinds of weights} {are supported|do you read|can you load|are accepted}?",
            "{can|do|will} you {load|read|accept|open} {pickle files|pickled weights|remote code|files with code}?",
        ),
    ),
    Fact(
        "The server stops taking requests, finishes the running ones, and exits.",
        (
            f"{_HOW} {{stop|shut down|end}} {{the server|the appliance|it}} {{cleanly|safely|gracefully|without losing requests}}?",
            "what {happens|do you do} {at|on|after} {SIGTERM|a shutdown|docker stop|the stop signal}?",
        ),
    ),
    Fact(
        "It means that the waiting queue is full: try again after a moment.",
        (
            "what {does|is} {status|error|the status|HTTP} 429{| mean| for| about}?",
            "why {do I get|did I get|does the server answer|am I told} {429|status 429|error 429|too many requests}?",
        ),
    ),
    Fact(
        "Yes. It runs on your machine, and no prompt leaves it.",
        (
            "{is|are} my {data|prompts|requests|texts} {private|safe|kept here|kept on this machine}?",
            "{do|does} {my prompts|my data|anything|my requests} {leave|go out of} {this machine|the machine|my network|the container}?",
        ),
    ),
    Fact(
        "Set APPLIANCE_LOG_LEVEL; APPLIANCE_LOG_JSON writes each line as JSON.",
        (
            f"{_HOW} {{see more|change|set|control|raise}} {{logs|the log level|logging|the logging}}?",
            "{which|what} {setting|variable|option} {sets|changes|controls} {the log level|logging|the logs}?",
        ),
    ),
    Fact(
        "Set APPLIANCE_SSL_MODE to TLS, with the paths of the certificate and key, or to MTLS, with the path of the client authorities too.",
        (
            f"{_HOW} {{enable|use|set up|switch on}} {{TLS|HTTPS|SSL|encryption|certificates}}?",
            "{can|does} the server {use|speak|support} {TLS|HTTPS|SSL|encryption}?",
        ),
    ),
    Fact(
        "I only know small tasks and the appliance; for anything else, serve a larger model.",
        (
            "{what|who|where|when} is {the capital of France|the president|the largest ocean|the highest mountain|the fastest car}?",
            "{write|tell|sing} me a {poem|story|song|joke|novel}{| about love| about the sea| please}.",
            "{what|how} is the {weather|news|stock market}{| today| tomorrow| in London}?",
        ),
    ),
)
