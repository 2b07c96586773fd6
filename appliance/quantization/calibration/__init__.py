"""Post-training quantization of one decoder block at a time: pure functions of tensors, no files, models or engines.

`block.py` says what a block is and what comes back, `statistics.py` gathers what the algorithms want to know of the
inputs of its products, and each algorithm is a file with one function of the same form:

    awq.calibrate(block, statistics, AwqOptions())                    -> QuantizedBlock of GroupedWeight
    gptq.calibrate(block, statistics, GptqOptions())                  -> QuantizedBlock of GroupedWeight
    smoothquant.calibrate(block, statistics, SmoothQuantOptions())    -> QuantizedBlock of ChannelWeight

A caller runs the block over its calibration tokens once, with `BlockStatistics.update` at the input of each product;
calls one of the three; and runs the block again with what came back to get the next block's inputs. Results are on the
device of the weights and the same on every run with the same inputs there.
"""
