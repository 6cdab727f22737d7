/* Packed linears on activations of 8 bits: linear.c with one plane of int8 instead of two, one scale per token and
 * 64 features, on the same packed weights. A library of its own, so that the names must differ. */
#define AC_PLANES 1
#define ac_linear ac_linear_a8
#define ac_linear_rows ac_linear_a8_rows
#define ac_linear_unit ac_linear_a8_unit
#define ac_linear_variant ac_linear_a8_variant
#define ac_input_bytes ac_input_a8_bytes
#define ac_input_place ac_input_a8_place
#define ac_input_quantize ac_input_a8_quantize
#define ac_weight_row ac_weight_a8_row
#define ac_weight_rows ac_weight_a8_rows
#define ac_weight_bf16 ac_weight_a8_bf16
#include "linear.c"
