"""Small tokenizers of Hugging Face folders: byte-level BPE as Llama 3 and Qwen have it."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Words with the character before them, up to three digits, signs, line ends, runs of white space.
WORDS = Regex(
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as in Llama 3
)
TEXT = [
    "def f(x):\n        return x + 12345  # naïve café, 漢字かな, العربية\n\n\n",
    "\t\ta  b   c    d 1 22 333 4444 \u2028",
]


def write_tokenizer(folder: Path, vocab_size: int = 380, nfc: bool = False) -> Path:
    """Write tokenizer.json and tokenizer_config.json into ``folder``.

    The tokenizer adds a begin, as Llama 3's, and cuts texts off: neither is for training. One added token, <tool>, is
    no special token, as in Qwen.

    Args:
        nfc: whether it normalises, as Qwen's.
    """
    fast = Tokenizer(BPE())
    if nfc:
        fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator([*TEXT * 5, Path(__file__).read_text()], trainer)
    fast.add_special_tokens([BOS, EOS])
    fast.add_tokens([AddedToken("<tool>", normalized=False)])
    fast.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, fast.token_to_id(BOS))])
    fast.enable_truncation(100)
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": {"__type": "AddedToken", "content": EOS, "special": True},
        "clean_up_tokenization_spaces": True,
        "chat_template": "{{ messages }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
