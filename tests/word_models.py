"""What the tests of conversions share: a tiny dense model, and a tokenizer whose words are those of the needle texts."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from winnow.rl import needles


def tiny_model(layers=2, vocab=50):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words():
    """A tokenizer of whole words and single digits."""
    known = [
        "<u>",
        "\n",
        *"0123456789",
        *["The", "secret", "number", "of", "is", ".", "and", "a", "red", "fox", "ran", "over", "old", "hills"],
        *needles.PLACES,
    ]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(known))}, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<u>", eos_token="<u>")
